"""MLServer with the fused graph: its part is the front end and the batching alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import BareGraph
from benchmarks.processes import REPOSITORY, free_port, running
from benchmarks.serving.peers import Environment
from benchmarks.serving.rule_file import OUTPUTS
from benchmarks.serving.target import Target, await_ready
from service.engine import cores
from service.pb.inference import open_inference_pb2 as pb
from service.tensors import DATATYPE, INPUT, TYPES

MODEL = "fused"


@dataclass(frozen=True)
class MlserverSetting:
    """What was tried."""

    workers: int  # processes that compute; 0: the server's own, in threads beside its event loop
    requests: int  # a batch has at most; 0: no adaptive batching
    delay: float = 0.0  # milliseconds that it waits for them

    @property
    def name(self) -> str:
        batching = f"batches of {self.requests} requests within {self.delay:g} ms" if self.requests else "no adaptive batching"
        return f"{self.workers} parallel workers, {batching}"


SETTINGS = (
    MlserverSetting(0, 0),
    MlserverSetting(0, 8, 0.5),
    MlserverSetting(0, 8, 2.0),
    MlserverSetting(0, 16, 2.0),
    MlserverSetting(2, 0),
    MlserverSetting(2, 8, 2.0),
)


@contextmanager
def mlserver(environment: Environment, folder: Path) -> Iterator[Target]:
    """The server over a folder that `write_model` wrote."""
    address = f"127.0.0.1:{free_port()}"
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "MLSERVER_GRPC_PORT": address.rpartition(":")[2],
        "MLSERVER_HTTP_PORT": str(free_port()),
    }
    command = [str(environment.python), "-m", "benchmarks.serving.mlserver_start", "start", str(folder)]
    with running(command, address, variables) as process:
        target = Target(address, MODEL)
        await_ready(process, target)
        yield target


def write_model(folder: Path, graph: BareGraph, classes: int, setting: MlserverSetting) -> None:
    """Its settings, its model, and what it keeps for perf_analyzer."""
    (folder / "fused.onnx").write_bytes(graph.content)
    if "masks" in graph.masks:
        np.save(folder / "masks.npy", graph.masks["masks"])
    server = {
        "debug": False, "host": "127.0.0.1", "metrics_endpoint": None, "parallel_workers": setting.workers,
        "environments_dir": str(folder / "environments"), "metrics_dir": str(folder / "metrics"),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server, indent=2))
    shapes = {name: [classes if name == "probabilities" else 1] for name in OUTPUTS}
    model: dict[str, Any] = {
        "name": MODEL,
        "implementation": "benchmarks.serving.mlserver_runtime.FusedModel",
        "inputs": [{"name": INPUT, "datatype": DATATYPE, "shape": [-1, *graph.shape]}],
        "outputs": [{"name": name, "datatype": OUTPUTS[name][0], "shape": [-1, *shape]} for name, shape in shapes.items()],
        "max_batch_size": setting.requests,
        "max_batch_time": setting.delay / 1000,
        "parameters": {"extra": {"folder": str(folder), "threads": 1 if setting.workers else cores()}},
    }
    (folder / "model-settings.json").write_text(json.dumps(model, indent=2))
    config = pb.ModelConfig(
        name=MODEL,
        platform="mlserver",
        backend="mlserver",
        max_batch_size=256,  # what a request may have, not what MLServer computes together
        input=[pb.ModelInput(name=INPUT, data_type=pb.TYPE_UINT8, dims=graph.shape)],
        output=[pb.ModelOutput(name=name, data_type=TYPES[OUTPUTS[name][0]], dims=shape) for name, shape in shapes.items()],
    )
    (folder / "ModelConfig").write_bytes(pb.ModelConfigResponse(config=config).SerializeToString())
    statistics = pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(name=MODEL, version="1")])
    (folder / "ModelStatistics").write_bytes(statistics.SerializeToString())
