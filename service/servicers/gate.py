"""Where every call comes in and goes out: identified, counted, admitted, its errors looked up in the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Never, TypeVar

import grpc

from service.access import ANONYMOUS, Caller
from service.batcher import Draining
from service.config import Scope
from service.context import Context
from service.errors import Failure, TooManyCalls, failure_of, request_id_of, rich_status
from service.fair_queue import Holdings
from service.logs import RequestLog, counted_verdicts
from service.metrics import CallMetrics, Metrics
from service.quota import Quotas
from service.servicers.call import Call
from service.servicers.catalogue import Catalogue
from service.servicers.watchdog import Watchdog

if TYPE_CHECKING:
    from service.tracing import Trace, Tracing  # the extra `tracing`

A_YEAR = 365 * 86400.0  # no deadline is a deadline in the far future
INFERENCES = ("Classify", "ClassifyStream", "ModelInfer")
MOST_AWAITED = 8  # messages of calls that have no place yet: half of the threads that are spare
MOST_RELOADS = 8  # that may overtake one call; each gives it another start

Answer = TypeVar("Answer")


class Begun(NamedTuple):
    """A request that was counted in."""

    method: str
    ensemble: str  # whose it is, or "" where it named none of ours
    counted: CallMetrics
    at: float  # time.perf_counter()
    trace: Trace | None = None


class Gate:
    """One per server; thread-safe."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.catalogue, self.metrics, self._tracing = catalogue, metrics, tracing
        self._calls: dict[tuple[str, str], tuple[str, CallMetrics]] = {}  # by method and name, "" included
        self.watchdog = Watchdog()
        self.ready = True
        self.last_answer_ms: dict[str, int] = {}  # by ensemble, since the epoch
        self.failed_seconds: dict[str, float] = {}  # by ensemble
        self._failures = threading.Lock()
        self._quotas, self._log = Quotas(), RequestLog(catalogue.config.logging.requests)
        self._admission = threading.Lock()
        most = catalogue.limits.max_concurrent_calls
        self._places = Holdings(most)
        self._stream_places = Holdings(max(1, most // 2))  # silent, a stream keeps its place: never all of them
        self.refusing = threading.Event()  # set when the server ends: no call is admitted any more

    def swap(self, catalogue: Catalogue) -> Catalogue:
        """Offer this from now on; returns what was offered before, whose calls are still being answered."""
        before, self.catalogue = self.catalogue, catalogue
        self._calls = {}  # which of the callers' names are ours may have changed
        return before

    def identify(self, context: Context, deadline: float | None = None) -> Call:
        """The call as it stands now; raises Unauthenticated. `deadline`, on the monotonic clock, is known after the first time."""
        catalogue = self.catalogue
        caller = catalogue.access.identify(context)
        name = _host(context.peer()) if caller.name == ANONYMOUS and _limited(caller) else caller.name
        return Call(catalogue, caller, self._quotas.of(name, caller.quota), context, deadline or deadline_of(context))

    def answer(
        self, method: str, name: str, context: grpc.ServicerContext, work: Callable[[Call], Answer], scope: Scope | None = None
    ) -> Answer:
        """Do the work of a unary call that needs no place, or end it with a status; `scope` is what the caller must have."""
        begun, call = self.begin(method, name, context), None
        try:
            call = self.identify(context)
            if scope is not None:
                call.caller.check(scope, method)
            answer = work(call)
        except Exception as error:
            failure = failure_of(error, call.request_id if call else request_id_of(context))
            self.end(begun, failure.code, call)
            self.log(begun, context, call, failure.code)
            abort(failure, context)
        self.end(begun, call=call)
        return answer

    @property
    def crowded(self) -> bool:
        """Whether a call must have a place before its message is waited for: none is free, or many messages do not come."""
        return self._places.full or self.watchdog.watched >= MOST_AWAITED

    def refuse(self, method: str, error: Exception, context: grpc.ServicerContext) -> Never:
        """End a call that no handler has seen, and count it."""
        failure, begun = failure_of(error), self.begin(method, "", context)
        self.end(begun, failure.code)
        self.log(begun, context, None, failure.code)
        abort(failure, context)

    def begin(self, method: str, name: str, context: Context) -> Begun:
        """Count a request in; `name` is as the caller wrote it."""
        ensemble, counted = self._counted(method, name)
        trace = self._tracing.begin(method, context) if self._tracing is not None else None
        return Begun(method, ensemble, counted, counted.begin(), trace)

    def end(self, begun: Begun, code: grpc.StatusCode = grpc.StatusCode.OK, call: Call | None = None) -> None:
        """Count a request out, whatever became of it, under the name it was counted in by; `call` is None for a stranger's."""
        begun.counted.end(begun.at, code.name)
        if begun.trace is not None:
            begun.trace.finish(code.name, _attributes(begun, call))
        if begun.method not in INFERENCES:
            return
        if code is grpc.StatusCode.OK:
            self.last_answer_ms[begun.ensemble] = time.time_ns() // 1_000_000
        else:
            with self._failures:
                spent = time.perf_counter() - begun.at
                self.failed_seconds[begun.ensemble] = self.failed_seconds.get(begun.ensemble, 0.0) + spent

    def log(self, begun: Begun, context: Context, call: Call | None, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """Write a line about a call, if its end is one of those that get one; `call` is None for a stranger's."""
        verdicts = call.verdicts if call else None
        if self._log.wants(code.name, verdicts):
            caller, request_id = (call.caller.name, call.request_id) if call else ("", request_id_of(context))
            seconds = time.perf_counter() - begun.at
            trace_id = begun.trace.id if begun.trace is not None else ""
            self._log.write(begun.method, begun.ensemble, caller, request_id, code.name, seconds, verdicts, trace_id)

    def take_place(self, caller: Caller) -> None:
        """One of the places for calls; raises TooManyCalls or Draining."""
        self._take(self._places, caller, "calls")

    def leave_place(self, caller: Caller) -> None:
        self._leave(self._places, caller)

    @contextmanager
    def stream_place(self, caller: Caller) -> Iterator[None]:
        """A place for a stream, which is one for a call, too; raises as `take_place` does."""
        with ExitStack() as taken:
            for places, kind in ((self._stream_places, "streams"), (self._places, "calls")):
                self._take(places, caller, kind)
                taken.callback(self._leave, places, caller)
            yield

    def begun_again(self, call: Call, work: Callable[[Call], Answer]) -> Answer:
        """The call's work; begun again where a reload closed the queue it was about to enter."""
        for _ in range(MOST_RELOADS):
            try:
                return work(call)
            except Draining:
                if call.catalogue is self.catalogue or self.refusing.is_set():
                    raise
                now = self.identify(call.context, call.deadline)
                call.catalogue, call.caller, call.quota = now.catalogue, now.caller, now.quota
        return work(call)

    def _take(self, places: Holdings, caller: Caller, kind: str) -> None:
        """As in a queue, a known caller leaves some for others."""
        if self.refusing.is_set():
            raise Draining("this server is shutting down")
        with self._admission:
            if not places.has_room(caller.turn, 1):
                raise TooManyCalls(places.total, kind)
            places.add(caller.turn, 1)

    def _leave(self, places: Holdings, caller: Caller) -> None:
        with self._admission:
            places.remove(caller.turn, 1)

    def _counted(self, method: str, name: str) -> tuple[str, CallMetrics]:
        """A caller's name becomes a label only where it is one of ours: labels are kept for ever."""
        calls = self._calls
        found = calls.get((method, name))
        if found is None:
            served = self.catalogue.served.get(name) if name else self.catalogue.default
            key = served.name if served else ""
            found = key, self.metrics.call(method, key)
            if served:
                calls[method, name] = found
        return found


def abort(failure: Failure, context: grpc.ServicerContext) -> Never:
    context.abort_with_status(rich_status(failure))
    raise AssertionError("abort_with_status returned")


def deadline_of(context: Context) -> float | None:
    """The caller's deadline on the monotonic clock. To be asked once: gRPC goes by the wall clock, and that may jump."""
    left = context.time_remaining()
    return None if left > A_YEAR else time.monotonic() + left


def _attributes(begun: Begun, call: Call | None) -> dict[str, str | int]:
    """What a span says of a request, and a line in the log, too."""
    found: dict[str, str | int] = {"phalanx.ensemble": begun.ensemble}
    if call is not None:
        found |= {"phalanx.caller": call.caller.name, "phalanx.request_id": call.request_id}
        if call.verdicts is not None:
            found |= {"phalanx.images": len(call.verdicts)}
            found |= {f"phalanx.images.{verdict}": count for verdict, count in counted_verdicts(call.verdicts).items()}
    return found


def _limited(caller: Caller) -> bool:
    return caller.quota.images_per_second is not None or caller.quota.concurrent_calls is not None


def _host(peer: str) -> str:
    """`ipv4:127.0.0.1:50051` without its port."""
    return peer.rpartition(":")[0]
