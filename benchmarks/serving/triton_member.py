"""One member as a model of Triton's Python backend: what becomes MEMBER/1/model.py in the repository.

All requests that Triton hands over together are computed together, by ONNX Runtime with the options of service/engine.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from benchmarks.serving.peer_session import MOST_AT_ONCE, open_graph, read_masks


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session, self.masks = open_graph(folder / "model.onnx"), read_masks(folder)

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        logits = self.logits(given[0] if len(given) == 1 else np.concatenate(given))
        answers, start = [], 0
        for images in given:
            own = logits[start : start + len(images)]
            answers.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("logits", own)]))
            start += len(images)
        return answers

    def logits(self, images: Any) -> Any:
        """(N, K); of a stochastic member (N, T, K): what Triton batches has the images first."""
        parts = []
        for start in range(0, len(images), MOST_AT_ONCE):
            feeds = {"image": images[start : start + MOST_AT_ONCE], **self.masks}
            (part,) = self.session.run(["logits"], feeds)
            parts.append(np.ascontiguousarray(part.swapaxes(0, 1)) if part.ndim == 3 else part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
