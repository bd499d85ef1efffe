"""Phalanx's fused graph as a model of MLServer, which imports this: the most that MLServer could be given to do.

The graph runs in threads beside the event loop, one for each core, on parts of at most sixteen images, as in service/engine.py.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.serving.peer_session import MOST_AT_ONCE, open_graph, read_masks
from benchmarks.serving.rule_file import OUTPUTS


class FusedModel(MLModel):  # type: ignore[misc]  # mlserver is not installed where types are checked
    async def load(self) -> bool:
        extra = self.settings.parameters.extra
        folder, self._threads = Path(extra["folder"]), int(extra["threads"])
        self._session, self._masks = open_graph(folder / "fused.onnx"), read_masks(folder)
        self._pool = ThreadPoolExecutor(self._threads)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (given,) = payload.inputs
        # raw contents come as a list of integers, one for each byte
        images = np.frombuffer(bytes(given.data.root), np.uint8).reshape(given.shape)
        parts = min(len(images), self._threads * math.ceil(len(images) / (self._threads * MOST_AT_ONCE)))
        loop = asyncio.get_running_loop()
        found = await asyncio.gather(*(loop.run_in_executor(self._pool, self._run, part) for part in np.array_split(images, parts)))
        outputs = [
            self._output(name, datatype, [part[index] for part in found])
            for index, (name, (datatype, _)) in enumerate(OUTPUTS.items())
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)

    def _run(self, images: Any) -> Any:
        return self._session.run(list(OUTPUTS), {"image": images, **self._masks})

    def _output(self, name: str, datatype: str, parts: list[Any]) -> ResponseOutput:
        column = parts[0] if len(parts) == 1 else np.concatenate(parts)
        column = column.reshape(len(column), -1)
        return ResponseOutput(name=name, shape=list(column.shape), datatype=datatype, data=column.ravel().tolist())
