"""Where every call comes in and goes out: counted, admitted, led to its ensemble, its errors looked up in the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Never, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from models.manifest import InputSpec
from service.batcher import DeadlineExceeded, Draining, Result
from service.codec import AnswerNames
from service.config import LimitsConfig
from service.ensembles import Ensembles, LoadedEnsemble
from service.errors import Failure, TooManyCalls, UnknownName, failure_of, request_id_of, rich_status
from service.metrics import CallMetrics, EnsembleMetrics, Metrics

A_YEAR = 365 * 86400.0  # no deadline is a deadline in the far future
INFERENCES = ("Classify", "ClassifyStream", "ModelInfer")

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Served:
    """One ensemble as the servicers see it."""

    name: str
    loaded: LoadedEnsemble
    metrics: EnsembleMetrics
    names: AnswerNames
    spec: InputSpec
    bundle_version: str


class Gate:
    """One per server; thread-safe."""

    def __init__(self, ensembles: Ensembles, metrics: Metrics, limits: LimitsConfig) -> None:
        self.ensembles, self.metrics, self.limits = ensembles, metrics, limits
        manifest = ensembles.bundle.manifest
        self.served: Mapping[str, Served] = {
            name: Served(
                name=name,
                loaded=loaded,
                metrics=loaded.metrics,
                names=AnswerNames(
                    manifest.classes,
                    tuple(voter.name for voter in loaded.ensemble.voters),
                    tuple(str(detector.name) for detector in loaded.ensemble.detectors),
                    any(manifest.member(name).stochastic for name in loaded.ensemble.members),
                ),
                spec=manifest.input,
                bundle_version=manifest.version,
            )
            for name, loaded in ensembles.items()
        }
        self.default = self.served[ensembles.default.name]
        self._calls: dict[tuple[str, str], tuple[str, CallMetrics]] = {}  # by method and name, "" included
        self.ready = True
        self.last_answer_ms: dict[str, int] = {}  # by ensemble, since the epoch
        self.failed_seconds: dict[str, float] = {}  # by ensemble
        self._failures = threading.Lock()
        self._places = threading.BoundedSemaphore(limits.max_concurrent_calls)
        # A stream keeps its place while it is silent: so that streams never shut out whoever has one question.
        self._most_streams = max(1, limits.max_concurrent_calls // 2)
        self._stream_places = threading.BoundedSemaphore(self._most_streams)
        self.refusing = threading.Event()  # set when the server ends: no call is admitted any more

    def find(self, name: str) -> Served:
        """The ensemble of this name; the default one for no name."""
        served = self.served.get(name) if name else self.default
        if served is None:
            raise UnknownName("ensemble", name, self.served, "ensemble")
        return served

    def answer(self, method: str, name: str, context: grpc.ServicerContext, work: Callable[[], Answer]) -> Answer:
        """Do the work of a unary call, or end it with a status."""
        began = self.begin(method, name)
        try:
            answer = self._admitted(work) if method in INFERENCES else work()
        except Exception as error:
            failure = failure_of(error, request_id_of(context))
            self.end(method, name, began, failure.code)
            abort(failure, context)
        self.end(method, name, began)
        return answer

    def refuse(self, method: str, error: Exception, context: grpc.ServicerContext) -> Never:
        """End a call that no handler has seen, and count it."""
        failure = failure_of(error)
        self.end(method, "", self.begin(method, ""), failure.code)
        abort(failure, context)

    def begin(self, method: str, name: str) -> float:
        """Count a request in; `name` is as the caller wrote it."""
        return self._counted(method, name)[1].begin()

    def end(self, method: str, name: str, began: float, code: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        """Count a request out, whatever became of it."""
        ensemble, counted = self._counted(method, name)
        counted.end(began, code.name)
        if method not in INFERENCES:
            return
        if code is grpc.StatusCode.OK:
            self.last_answer_ms[ensemble] = time.time_ns() // 1_000_000
        else:
            with self._failures:
                self.failed_seconds[ensemble] = self.failed_seconds.get(ensemble, 0.0) + time.perf_counter() - began

    def _counted(self, method: str, name: str) -> tuple[str, CallMetrics]:
        """A caller's name becomes a label only where it is one of ours: labels are kept for ever."""
        found = self._calls.get((method, name))
        if found is None:
            served = self.served.get(name) if name else self.default
            key = served.name if served else ""
            found = key, self.metrics.call(method, key)
            if served:
                self._calls[method, name] = found
        return found

    def _admitted(self, work: Callable[[], Answer]) -> Answer:
        self.admit()
        try:
            return work()
        finally:
            self.leave()

    def admit(self) -> None:
        """Take one of the places for calls, or raise TooManyCalls or Draining; `leave` gives it back."""
        if self.refusing.is_set():
            raise Draining("this server is shutting down")
        if not self._places.acquire(blocking=False):
            raise TooManyCalls(self.limits.max_concurrent_calls)

    def leave(self) -> None:
        self._places.release()

    def admit_stream(self) -> None:
        """As `admit`, for a stream; `leave_stream` gives the place back."""
        if not self._stream_places.acquire(blocking=False):
            raise TooManyCalls(self._most_streams, "streams")
        try:
            self.admit()
        except Exception:
            self._stream_places.release()
            raise

    def leave_stream(self) -> None:
        self.leave()
        self._stream_places.release()


def abort(failure: Failure, context: grpc.ServicerContext) -> Never:
    context.abort_with_status(rich_status(failure))
    raise AssertionError("abort_with_status returned")


def seconds_left(context: grpc.ServicerContext) -> float | None:
    left = context.time_remaining()
    return None if left > A_YEAR else left


def deadline_of(context: grpc.ServicerContext) -> float | None:
    """The caller's deadline on the batcher's clock."""
    left = seconds_left(context)
    return None if left is None else time.monotonic() + left


def submit(served: Served, images: NDArray[np.uint8], context: grpc.ServicerContext) -> Future[Result]:
    """Queue images; they leave the queue when the caller's deadline passes."""
    return served.loaded.batcher.submit(images, deadline_of(context))


def compute(served: Served, images: NDArray[np.uint8], context: grpc.ServicerContext) -> Result:
    """The answers to images: at once where nobody else is about, else through the queue, which they leave when the caller does."""
    if (result := served.loaded.batcher.compute_now(images, deadline_of(context))) is not None:
        return result
    future = submit(served, images, context)

    def give_up() -> None:
        future.cancel()

    if not context.add_callback(give_up):
        give_up()
    return wait(future, context)


def wait(future: Future[Result], context: grpc.ServicerContext) -> Result:
    left = seconds_left(context)
    try:
        return future.result(left)
    except TimeoutError:
        if future.done():  # not ours: the work itself raised it
            raise
        future.cancel()
        raise DeadlineExceeded("the deadline passed while the images waited or were computed") from None
