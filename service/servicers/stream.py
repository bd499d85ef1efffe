"""ClassifyStream: a reader takes requests in and queues their images, while the handler answers them in order.

So images of one stream share runs with each other and with everybody else's.  At most WINDOW requests of a stream are
in the service at once; then the reader stops reading, and gRPC's flow control makes the sender wait. A stream that asks
nothing for long is ended, so is one whose caller reads no answer for as long, and one with nothing left to answer when the
server ends: it would keep its thread.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter

import grpc
import numpy as np

from service.batcher import Draining, Result
from service.codec import Answers, decode_one, write_error
from service.config import Disclosure
from service.errors import SilentStream, TooFast, TooManyCalls, Unauthenticated, failure_of, request_id_of
from service.images import PixelBudget, Pixels
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.servicers.call import Call
from service.servicers.catalogue import Served
from service.servicers.gate import Begun, Gate, abort, deadline_of
from service.servicers.malformed import Malformed

WINDOW = 64
METHOD = "ClassifyStream"
LOOK_SECONDS = 0.5  # how often a silent stream looks whether the server ends


@dataclass(frozen=True, slots=True)
class _Submitted:
    served: Served
    call: Call
    level: Disclosure
    image: Pixels
    future: Future[Result]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A request that was read: submitted, or already failed."""

    id: str
    ensemble: str
    begun: Begun
    outcome: _Submitted | Exception


def answer_stream(
    gate: Gate, requests: Iterator[pb.ClassifyStreamRequest], context: grpc.ServicerContext
) -> Iterator[pb.ClassifyStreamResponse]:
    with ExitStack() as places:
        try:
            call = gate.identify(context)
            call.quota.begin_call()
            places.callback(call.quota.end_call)
            places.enter_context(gate.stream_place(call.caller))
        except (Draining, TooFast, TooManyCalls, Unauthenticated) as error:
            gate.refuse(METHOD, error, context)  # counted here: an admitted stream is counted by its requests
        try:
            yield from _Stream(gate, context).answers(requests)
        except (Draining, SilentStream, Unauthenticated) as error:
            abort(failure_of(error), context)


class _Stream:
    def __init__(self, gate: Gate, context: grpc.ServicerContext) -> None:
        self._gate, self._context, self._deadline = gate, context, deadline_of(context)
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()  # None: no more will come
        self._room = threading.Semaphore(WINDOW)
        self._over = threading.Event()
        self._pending: set[Future[Result]] = set()

    def answers(self, requests: Iterator[pb.ClassifyStreamRequest]) -> Iterator[pb.ClassifyStreamResponse]:
        self._context.add_callback(self._end)  # the caller gave up: the reader must not wait for room any more
        threading.Thread(target=self._read, args=(requests,), name="stream-reader", daemon=True).start()
        try:
            while (entry := self._next()) is not None:
                response = self._leave(entry)
                self._room.release()
                with self._gate.watchdog.within(self._idle, self._context):
                    yield response  # returns when there is room for it on the way to the caller
        finally:
            self._end()
            self._abandon()

    @property
    def _idle(self) -> float:
        return self._gate.catalogue.limits.stream_idle_seconds

    def _next(self) -> _Entry | None:
        """The entry to answer next, or None at the end; a stream that waits for its caller does not wait for ever."""
        idle = self._idle
        until = monotonic() + idle
        while not self._gate.refusing.is_set():
            try:
                return self._entries.get(timeout=min(LOOK_SECONDS, max(0.0, until - monotonic())))
            except queue.Empty:
                if monotonic() >= until:
                    raise SilentStream(f"no request came for {idle:g} s") from None
        try:
            return self._entries.get_nowait()
        except queue.Empty:
            raise Draining("this server is shutting down") from None

    def _read(self, requests: Iterator[pb.ClassifyStreamRequest]) -> None:
        try:
            with contextlib.suppress(grpc.RpcError):  # raised by the iterator where the call ends early
                for request in requests:
                    self._room.acquire()
                    if self._over.is_set():
                        break
                    self._entries.put(self._enter(request))
        finally:
            if self._over.is_set():  # while it read the last request
                self._abandon()
            self._entries.put(None)  # last, or it would be abandoned, too, and the stream wait for what never comes

    def _end(self) -> None:
        self._over.set()
        self._room.release()
        for future in tuple(self._pending):
            future.cancel()

    def _abandon(self) -> None:
        """Count out what was read and will not be answered."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (entry := self._entries.get_nowait()) is not None:
                    self._gate.end(entry.begun, grpc.StatusCode.CANCELLED)

    def _enter(self, request: pb.ClassifyStreamRequest | Malformed) -> _Entry:
        if isinstance(request, Malformed):
            return _Entry("", "", self._gate.begin(METHOD, "", self._context), request.error)
        begun = self._gate.begin(METHOD, request.ensemble, self._context)
        return _Entry(request.id, request.ensemble, begun, self._submitted(request, begun))

    def _submitted(self, request: pb.ClassifyStreamRequest, begun: Begun) -> _Submitted | Exception:
        try:
            call = self._gate.identify(
                self._context, self._deadline
            )  # for every request: a token may be revoked while a stream is open
            call.trace = begun.trace
            call.spend(1)
            return self._gate.begun_again(call, partial(self._submit, request))
        except Exception as error:
            return error

    def _submit(self, request: pb.ClassifyStreamRequest, call: Call) -> _Submitted:
        served = call.ensemble(request.ensemble)
        level = call.disclosure(request.disclosure, served)
        began = perf_counter()
        image = decode_one(request.image, served.spec, PixelBudget(call.catalogue.limits.max_image_pixels), "image")
        call.decoded(served, began)
        future = call.submit(served, image.array[np.newaxis])
        self._pending.add(future)
        return _Submitted(served, call, level, image, future)

    def _leave(self, entry: _Entry) -> pb.ClassifyStreamResponse:
        """The answer to one request; an error is one too, and does not end the stream."""
        response = pb.ClassifyStreamResponse(id=entry.id)
        code, call = grpc.StatusCode.OK, entry.outcome.call if isinstance(entry.outcome, _Submitted) else None
        try:
            if isinstance(entry.outcome, Exception):
                raise entry.outcome
            served, level = entry.outcome.served, entry.outcome.level
            result = entry.outcome.call.wait(entry.outcome.future)
            entry.outcome.call.answered(served, entry.outcome.image.array[np.newaxis], result)
            began = perf_counter()
            response.ensemble, response.bundle_version = served.name, served.bundle_version
            response.disclosure = pb.Disclosure.ValueType(level)
            Answers(result, served.names, level).write(0, response.result.classification, entry.outcome.image.resized)
            entry.outcome.call.encoded(served, began)
        except Unauthenticated:
            code = grpc.StatusCode.UNAUTHENTICATED
            raise  # the stream's, and not this request's alone
        except Exception as error:
            failure = failure_of(error, call.request_id if call else request_id_of(self._context))
            code = failure.code
            response.ensemble = entry.ensemble
            write_error(response.result, failure)
        finally:
            if isinstance(entry.outcome, _Submitted):
                self._pending.discard(entry.outcome.future)
            self._gate.end(entry.begun, code, call)
            self._gate.log(entry.begun, self._context, call, code)
        return response
