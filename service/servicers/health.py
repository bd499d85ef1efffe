"""grpc.health.v1 and server reflection, for the server as a whole, for each API, and for each ensemble by its name."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from service.config import Scope
from service.errors import Forbidden, TooManyCalls, Unauthenticated
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import defense_ensemble_pb2
from service.servicers.gate import Gate
from service.servicers.malformed import Malformed

SERVICES = DEFENSE_ENSEMBLE, OPEN_INFERENCE = (
    defense_ensemble_pb2.DESCRIPTOR.services_by_name["DefenseEnsemble"].full_name,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


OPEN_TO_ALL = ("", *SERVICES)
REFLECTION_STREAMS, WATCHERS = 4, 8  # at once
NOTHING = health_pb2.HealthCheckRequest(service="nothing of this name")


class Health(health.HealthServicer):
    """grpcio's, in threads: what it does without them holds a lock over a send, and a watcher that hangs up then stops everything.

    Only a few watch at once, as each keeps a thread; they can be sent away, or they would hold up the server's end. Strangers
    to a server that names its callers learn of the server and its APIs, not of its ensembles.
    """

    def __init__(self, gate: Gate) -> None:
        super().__init__(experimental_non_blocking=False)
        self._gate = gate
        self._watched: set[grpc.ServicerContext] = set()
        self._places = threading.BoundedSemaphore(WATCHERS)
        for name in OPEN_TO_ALL:
            self.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._offered = set[str]()
        self.offer(gate.catalogue.served)

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send_response_callback: Any = None
    ) -> Any:
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{WATCHERS} callers watch already; come back later, or Check")
        self._watched.add(context)

        def leave() -> None:
            self._watched.discard(context)
            self._places.release()

        if not context.add_callback(leave):
            leave()
        # whatever else is asked for shares one name, which is never here: grpcio keeps every name for ever
        return super().Watch(request if self._is_told(request.service, context) else NOTHING, context)

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Any:
        """`SERVICE_UNKNOWN` is for watchers only: an ensemble that is gone is answered as one that was never here."""
        answer: Any = super().Check(request if self._is_told(request.service, context) else NOTHING, context)
        if answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.abort(grpc.StatusCode.NOT_FOUND, "")
        return answer

    def offer(self, names: Iterable[str]) -> None:
        """These ensembles are answered for, and no others any more."""
        offered = set(names)
        for gone in self._offered - offered:
            self.set(gone, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        for name in offered - self._offered:
            self.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._offered = offered

    def end_watches(self) -> None:
        for context in tuple(self._watched):
            context.cancel()

    def _is_told(self, name: str, context: grpc.ServicerContext) -> bool:
        """Whether the caller may know if there is something of this name, and there is, or was."""
        if name in OPEN_TO_ALL:
            return True
        if name not in self._offered:
            return False
        try:
            caller = self._gate.identify(context).caller
        except Unauthenticated:
            return False
        return Scope.DESCRIBE in caller.scopes or caller.may_ask(name)


class Reflection(reflection.ReflectionServicer):
    """grpcio's, but for callers who may be told, and of its streams only a few are open at once: each keeps a thread for as
    long as its caller likes.
    """

    def __init__(self, names: Iterable[str], gate: Gate) -> None:
        super().__init__(names)
        self._gate = gate
        self._places = threading.BoundedSemaphore(REFLECTION_STREAMS)

    def ServerReflectionInfo(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        method = "ServerReflectionInfo"

        def parsed() -> Iterator[Any]:
            for request in request_iterator:
                if isinstance(request, Malformed):
                    self._gate.refuse(method, request.error, context)
                yield request

        try:
            self._gate.identify(context).caller.check(Scope.DESCRIBE, "reflection")
            if not self._places.acquire(blocking=False):
                raise TooManyCalls(REFLECTION_STREAMS, "reflection streams")
        except (Unauthenticated, Forbidden, TooManyCalls) as error:
            self._gate.refuse(method, error, context)
        try:
            yield from super().ServerReflectionInfo(parsed(), context)
        finally:
            self._places.release()


def add_health(server: grpc.Server, gate: Gate) -> Health:
    """Everything SERVING; `enter_graceful_shutdown` of what is returned says NOT_SERVING for all, for good."""
    servicer = Health(gate)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def add_reflection(server: grpc.Server, gate: Gate) -> None:
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names, gate), server)  # type: ignore[no-untyped-call]
