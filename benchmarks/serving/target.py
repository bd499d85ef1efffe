"""A server that was started to be asked, in the Open Inference Protocol."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import START_SECONDS, Process
from service.pb.inference import open_inference_pb2 as pb
from service.pb.inference import open_inference_pb2_grpc as pb_grpc
from service.tensors import DATATYPE, DTYPES, INPUT


@dataclass(frozen=True)
class Target:
    """Where it listens, and which of its models is the ensemble."""

    address: str
    model: str

    def answers(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Every output for images (n, h, w, c), which go as one request."""
        tensor = pb.ModelInferRequest.InferInputTensor(name=INPUT, datatype=DATATYPE, shape=images.shape)
        request = pb.ModelInferRequest(model_name=self.model, inputs=[tensor], raw_input_contents=[images.tobytes()])
        with grpc.insecure_channel(self.address) as channel:
            answer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60.0)
        raw = zip(answer.outputs, answer.raw_output_contents, strict=True)
        return {each.name: np.frombuffer(content, DTYPES[each.datatype]).reshape(len(images), -1) for each, content in raw}

    def warm(self, images: NDArray[np.uint8], callers: int, calls: int) -> None:
        """Every caller asks so often; first runs are slower than all others."""
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(lambda _: self.answers(images), range(callers * calls)))


def await_ready(process: Process, target: Target) -> None:
    """Ask for the model's readiness until it is there; not every server speaks grpc.health.v1."""
    end = time.monotonic() + START_SECONDS
    options = [(f"grpc.{which}_reconnect_backoff_ms", 50) for which in ("initial", "min", "max")]
    with grpc.insecure_channel(target.address, options) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        while time.monotonic() < end:
            try:
                if stub.ModelReady(pb.ModelReadyRequest(name=target.model), timeout=5.0).ready:
                    return
            except grpc.RpcError:  # not listening yet, or its model not loaded: every server says so in its own way
                pass
            if process.ended:
                raise RuntimeError("the server ended before it was ready; what it said follows")
            time.sleep(0.05)
    raise TimeoutError(f"{target.model} not ready on {target.address} after {START_SECONDS:g} s")
