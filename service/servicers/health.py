"""grpc.health.v1 and server reflection, for the server as a whole, for each API, and for each ensemble by its name."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from service.config import Scope
from service.errors import Forbidden, Unauthenticated
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import defense_ensemble_pb2
from service.servicers.gate import Gate

SERVICES = (
    defense_ensemble_pb2.DESCRIPTOR.services_by_name["DefenseEnsemble"].full_name,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


REFLECTION_STREAMS = 4


class Health(health.HealthServicer):
    """grpcio's, but its watchers can be sent away: they watch for ever, and would hold up the server's end."""

    def __init__(self, ensembles: Iterable[str]) -> None:
        super().__init__()
        self._watched: set[grpc.ServicerContext] = set()
        for name in ("", *SERVICES):
            self.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._offered = set[str]()
        self.offer(ensembles)

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send_response_callback: Any = None
    ) -> Any:
        self._watched.add(context)
        context.add_callback(lambda: self._watched.discard(context))
        return super().Watch(request, context, send_response_callback)

    def offer(self, names: Iterable[str]) -> None:
        """These ensembles are answered for, and no others any more."""
        offered = set(names)
        for gone in self._offered - offered:
            self.set(gone, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        for name in offered - self._offered:
            self.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._offered = offered

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Any:
        """As for a name that was never here, where an ensemble is gone; `SERVICE_UNKNOWN` is for watchers only."""
        answer: Any = super().Check(request, context)
        if answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, "")
        return answer

    def end_watches(self) -> None:
        for context in tuple(self._watched):
            context.cancel()


def add_health(server: grpc.Server, ensembles: Iterable[str]) -> Health:
    """Everything SERVING; `enter_graceful_shutdown` of what is returned says NOT_SERVING for all, for good."""
    servicer = Health(ensembles)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


class Reflection(reflection.ReflectionServicer):
    """grpcio's, but for callers who may be told, and of its streams only a few are open at once: each keeps a thread for as
    long as its caller likes.
    """

    def __init__(self, names: Iterable[str], gate: Gate) -> None:
        super().__init__(names)
        self._gate = gate
        self._places = threading.BoundedSemaphore(REFLECTION_STREAMS)

    def ServerReflectionInfo(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        try:
            self._gate.identify(context).caller.check(Scope.DESCRIBE, "reflection")
        except (Unauthenticated, Forbidden) as error:
            self._gate.refuse("ServerReflectionInfo", error, context)
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{REFLECTION_STREAMS} callers are told already; come back later")
        try:
            yield from super().ServerReflectionInfo(request_iterator, context)
        finally:
            self._places.release()


def add_reflection(server: grpc.Server, gate: Gate) -> None:
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names, gate), server)  # type: ignore[no-untyped-call]
