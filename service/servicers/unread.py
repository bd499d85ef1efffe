"""Calls for which there is no place: refused before their message is read.

gRPC receives and parses a message before it calls a unary handler: of a call that is refused, up to `max_message_bytes` that
nobody will look at, and one more change of threads. A handler that takes a stream decides itself what it reads, and this one
reads nothing. A refused call of 98 KB costs a fifth less CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Never

import grpc

from service.servicers.gate import INFERENCES, Gate

UNARY = tuple(method for method in INFERENCES if not method.endswith("Stream"))


class Doorkeeper(grpc.ServerInterceptor):
    """Looks for a place as a call comes in. That there is one may have changed when the call asks for it: the gate decides."""

    def __init__(self, gate: Callable[[], Gate]) -> None:
        """`gate` is asked once calls come in: a server has its interceptors before it has a gate."""
        self._gate = gate

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: grpc.RpcMethodHandler[Any, Any] | None = continuation(details)
        method = details.method.rpartition("/")[2]
        if handler is None or method not in UNARY or not self._gate().full:
            return handler
        return grpc.stream_unary_rpc_method_handler(partial(self._refuse, method))

    def _refuse(self, method: str, _: object, context: grpc.ServicerContext) -> Never:
        self._gate().refuse_unread(method, context)
