"""A unary method that classifies, apart from whoever carries its messages: in the thread of the call, or in none of its own.

grpcio waits for a message, and parses it, before it calls a unary handler, in a thread of ours and without a limit of time. A
handler that takes a stream decides itself what it reads. While there is no place, or many messages do not come, a caller must be
known and have a place before: to refuse 98 KB costs a fifth less CPU, and those who send a byte a second leave threads for others.
Else the message is read first, which is faster: what is done while gRPC receives it competes with gRPC for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message

from service.access import Caller
from service.batcher import Result
from service.context import Context
from service.engine import Images
from service.errors import Failure, failure_of, request_id_of
from service.quota import Quota
from service.servicers.call import Call
from service.servicers.catalogue import Served
from service.servicers.gate import Begun, Gate, abort
from service.servicers.malformed import Malformed, received

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True, slots=True)
class Asked(Generic[Response]):
    """What a request comes to once it is read."""

    served: Served
    images: Images  # none where every image of the request is broken
    answer: Callable[[Result | None], Response]


@dataclass(frozen=True, slots=True)
class Inference(Generic[Request, Response]):
    """However it is called, it does the same: find a place, read, compute, answer, count and log."""

    gate: Gate
    method: str
    ensemble: Callable[[Request], str]  # which the request names
    read: Callable[[Request, Call], Asked[Response]]
    quick: Callable[[Request], bool]  # whether it is read in no time, as pixels are and files are not

    def __call__(self, requests: Iterator[Request | Malformed], context: grpc.ServicerContext) -> Response:
        """As a handler of grpcio, which gets the call before its message."""
        asking = _Asking(self.gate, self.method, context)
        try:
            if self.gate.crowded:
                asking.enter()
            request = received(requests, self.gate, context)
            asking.begin(self.ensemble(request))
            call = asking.enter()
            return asking.succeeded(self.gate.begun_again(call, partial(self._computed, request)))
        except Exception as error:
            abort(asking.failed(error), context)

    def now(self, request: Request, context: Context) -> Response | Failure:
        """In this thread, which waits."""
        asking = _Asking(self.gate, self.method, context)
        asking.begin(self.ensemble(request))
        try:
            call = asking.enter()
            return asking.succeeded(self.gate.begun_again(call, partial(self._computed, request)))
        except Exception as error:
            return asking.failed(error)

    def later(self, request: Request, context: Context, tell: Callable[[Response | Failure], None]) -> None:
        """Return as soon as the images wait for their run; whoever computes them tells the outcome."""
        asking = _Asking(self.gate, self.method, context)
        asking.begin(self.ensemble(request))
        try:
            call = asking.enter()
            asked, future = self.gate.begun_again(call, partial(self._submitted, request))
        except Exception as error:
            tell(asking.failed(error))
            return

        def end(future: Future[Result] | None) -> None:
            try:
                result = call.ended(asked.served, asked.images, future) if future else None
                outcome: Response | Failure = asking.succeeded(asked.answer(result))
            except Exception as error:
                outcome = asking.failed(error)
            tell(outcome)

        if future is None:
            end(None)
        else:
            future.add_done_callback(end)
            call.give_up_with_caller(future)

    def refused(self, error: Exception, context: Context) -> Failure:
        """What becomes of a request that is none."""
        return _Asking(self.gate, self.method, context).failed(error)

    def _computed(self, request: Request, call: Call) -> Response:
        asked = self.read(request, call)
        return asked.answer(call.compute(asked.served, asked.images) if len(asked.images) else None)

    def _submitted(self, request: Request, call: Call) -> tuple[Asked[Response], Future[Result] | None]:
        asked = self.read(request, call)
        return asked, call.submit(asked.served, asked.images) if len(asked.images) else None


class _Asking:
    """One request from its first to its last moment: its place, its count, its line in the log."""

    __slots__ = ("_begun", "_call", "_caller", "_context", "_gate", "_method", "_quota")

    def __init__(self, gate: Gate, method: str, context: Context) -> None:
        self._gate, self._method, self._context = gate, method, context
        self._begun: Begun | None = None
        self._call: Call | None = None
        self._caller: Caller | None = None  # who has a place
        self._quota: Quota | None = None  # that counts this call

    def begin(self, ensemble: str) -> None:
        """Count it in; what ends before is counted as the default ensemble's, as what it names was not read."""
        self._begun = self._gate.begin(self._method, ensemble, self._context)
        if self._call is not None:
            self._call.trace = self._begun.trace

    def enter(self) -> Call:
        """Who asks, with a place; raises what `failed` is to be told."""
        if self._call is not None:
            return self._call
        call = self._call = self._gate.identify(self._context)
        if self._begun is not None:
            call.trace = self._begun.trace
        self._gate.take_place(call.caller)
        self._caller = call.caller
        call.quota.begin_call()
        self._quota = call.quota
        return call

    def succeeded(self, response: Response) -> Response:
        self._end(grpc.StatusCode.OK)
        return response

    def failed(self, error: Exception) -> Failure:
        failure = failure_of(error, self._call.request_id if self._call else request_id_of(self._context))
        self._end(failure.code)
        return failure

    def _end(self, code: grpc.StatusCode) -> None:
        if self._quota is not None:
            self._quota.end_call()
        if self._caller is not None:
            self._gate.leave_place(self._caller)
        begun = self._begun or self._gate.begin(self._method, "", self._context)
        self._gate.end(begun, code, self._call)
        self._gate.log(begun, self._context, self._call, code)
