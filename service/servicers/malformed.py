"""Requests that are no message of their method: answered INVALID_ARGUMENT and counted, as all that a caller gets wrong.

gRPC's own answer would be INTERNAL, with a traceback in the log for every one, and no handler would hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.errors import InvalidRequest
from service.servicers.gate import Gate


@dataclass(frozen=True, slots=True)
class Malformed:
    """What a request is whose bytes cannot be parsed. Streams meet it among their requests; unary methods never see it."""

    error: InvalidRequest


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

        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            if isinstance(request, Malformed):
                self._gate.refuse(method, request.error, context)
            return answer(request, context)

        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(checked, parse, write)
        return grpc.unary_unary_rpc_method_handler(checked, parse, write)


def lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse`, but of bytes that are no message makes Malformed."""

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return Malformed(InvalidRequest(f"expected a message of this method, got {len(data)} bytes that cannot be parsed"))

    return parsed
