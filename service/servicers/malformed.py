"""Requests that are no message of their method, or do not come: answered and counted, as all that a caller gets wrong.

gRPC's own answer would be INTERNAL, with a traceback in the log for every one, and no handler would hear of it. For a message that
does not come it would wait for ever, in a thread of ours: unary handlers are registered as such that take a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from service.errors import InvalidRequest
from service.servicers.gate import INFERENCES, Gate


@dataclass(frozen=True, slots=True)
class Malformed:
    """What a request is whose bytes cannot be parsed. Streams meet it among their requests; unary methods never see it."""

    error: InvalidRequest


Request = TypeVar("Request")


class Registrar:
    """Stands in for the server where generated code adds a servicer: unary handlers are wrapped on the way."""

    def __init__(self, server: grpc.Server, gate: Gate) -> None:
        self._server, self._gate = server, gate

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: generated code registers every method by its name as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        wrapped = {method: self._lenient(method, handler) for method, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))
        self._server.add_registered_method_handlers(service, wrapped)

    def _lenient(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        parse, write = lenient(handler.request_deserializer), handler.response_serializer
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, parse, write)
        answer = handler.unary_unary or handler.unary_stream
        assert answer is not None, f"{method}: no method is foreseen that takes a stream and answers once"

        def awaited(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            try:
                request = received(requests, self._gate, context)
            except (CancelledError, InvalidRequest) as error:
                self._gate.refuse(method, error, context)
            return answer(request, context)

        if handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(awaited, parse, write)
        return grpc.stream_unary_rpc_method_handler(answer if method in INFERENCES else awaited, parse, write)


def received(requests: Iterator[Request | Malformed], gate: Gate, context: grpc.ServicerContext) -> Request:
    """The message of a unary call; raises InvalidRequest, or CancelledError where the caller, or the watchdog, ended the wait."""
    try:
        with gate.watchdog.within(gate.catalogue.limits.message_seconds, context):
            request = next(requests, None)
    except grpc.RpcError:
        raise CancelledError from None
    if request is None:
        raise InvalidRequest("expected a message of this method, got none")
    if isinstance(request, Malformed):
        raise request.error
    return request


def lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse`, but of bytes that are no message makes Malformed."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return Malformed(InvalidRequest(f"expected a message of this method, got {len(data)} bytes that cannot be parsed"))

    return parsed
