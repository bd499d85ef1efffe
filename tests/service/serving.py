"""A real server on a free port over a tiny bundle, and a real channel to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status
from numpy.typing import NDArray

from service.config import ServiceConfig
from service.graph_cache import GraphCache
from service.pb.inference import open_inference_pb2_grpc
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.pb.phalanx.v1 import defense_ensemble_pb2_grpc
from service.server import Server

SIZE = 8  # of the tiny bundle's images
ENSEMBLES: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "no-edge": {"without": ["edge"]},
    "votes-only": {"detectors": []},
    "fresh": {"masks": "fresh"},
}


@dataclass(frozen=True)
class Running:
    server: Server
    channel: grpc.Channel
    native: defense_ensemble_pb2_grpc.DefenseEnsembleStub
    open_inference: open_inference_pb2_grpc.GRPCInferenceServiceStub
    health: Any  # its published types know no methods

    def scrape(self) -> dict[str, float]:
        """Every time series by its name and labels, as Prometheus sees them."""
        with urlopen(f"http://{self.server.metrics_address}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def connected(server: Server) -> Running:
    channel = grpc.insecure_channel(str(server.address), [("grpc.max_send_message_length", -1)])
    return Running(
        server,
        channel,
        defense_ensemble_pb2_grpc.DefenseEnsembleStub(channel),
        open_inference_pb2_grpc.GRPCInferenceServiceStub(channel),
        health_pb2_grpc.HealthStub(channel),
    )


def configured(bundle: Path, **sections: Any) -> ServiceConfig:
    """Quick to start, quick to stop, one thread, free ports."""
    plain = {
        "bundle": bundle,
        "listen": "127.0.0.1:0",
        "metrics": "127.0.0.1:0",
        "ensembles": ENSEMBLES,
        "device": {"provider": "cpu", "threads": 1},
        "shutdown": {"notice_seconds": 0, "drain_seconds": 10},
    }
    return ServiceConfig.model_validate({**plain, **sections})


@contextmanager
def serving(bundle: Path, cache: GraphCache, **sections: Any) -> Iterator[Running]:
    with Server(configured(bundle, **sections), cache) as server:
        running = connected(server)
        with running.channel:
            yield running


def random_pixels(n: int, seed: int = 0, size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def raw(pixels: NDArray[np.uint8]) -> pb.Image:
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawImage(pixels=pixels.tobytes(), height=height, width=width, channels=channels))


def request(
    pixels: NDArray[np.uint8], ensemble: str = "", disclosure: pb.Disclosure.ValueType = pb.DISCLOSURE_UNSPECIFIED
) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(ensemble=ensemble, images=[raw(image) for image in pixels], disclosure=disclosure)


def violated_field(error: grpc.RpcError) -> str:
    """The field that a rich status's BadRequest names; "" without one."""
    detail = error_details_pb2.BadRequest()
    return detail.field_violations[0].field if _unpacked(error, detail) else ""


def retry_seconds(error: grpc.RpcError) -> float | None:
    detail = error_details_pb2.RetryInfo()
    return detail.retry_delay.ToNanoseconds() / 1e9 if _unpacked(error, detail) else None


def reason(error: grpc.RpcError) -> tuple[str, str]:
    """The domain and the reason that a rich status's ErrorInfo has; ("", "") without one."""
    detail = error_details_pb2.ErrorInfo()
    return (detail.domain, detail.reason) if _unpacked(error, detail) else ("", "")


def _unpacked(error: grpc.RpcError, detail: Any) -> bool:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # grpcio's errors are calls as well
    return status is not None and any(packed.Unpack(detail) for packed in status.details)
