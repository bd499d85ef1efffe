"""One queue in front of one engine: requests wait here and nowhere else, and are computed together.

When does a batch start? While a run is under way, requests gather; when it ends, all of them go at once. A request
that finds the engine idle waits only for callers who were answered together a moment ago and are likely to come back:
until as many requests wait as the last run answered, but no longer than `max_delay` after that run. So a lone caller
never waits, and callers in step stay in step.

A large request is split into runs of `max_batch_size` and rejoined; after each of its runs it goes to the back of the
queue, so that the requests behind it wait for one run and not for all of it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, fields
from typing import Protocol

import numpy as np

from models.ensemble import Decision
from service.config import BatchingConfig
from service.engine import Images, Run
from service.metrics import EnsembleMetrics

log = logging.getLogger(__name__)

_COLUMNS = tuple(column.name for column in fields(Decision))


class QueueFull(Exception):
    """Refused at once, instead of waiting behind more images than the queue may hold."""

    def __init__(self, images: int, waiting: int, limit: int, retry_seconds: float) -> None:
        super().__init__(f"the queue holds {waiting} of at most {limit} images and has no room for {images} more")
        self.retry_seconds = retry_seconds  # when the queue is expected to be empty


class DeadlineExceeded(Exception):
    """The caller's deadline passed, or would pass, before the work could be done; what was left of it was not begun."""


class Draining(Exception):
    """The batcher takes no more work."""


@dataclass(frozen=True, slots=True)
class Result:
    """A request's answers, in the order of its images."""

    decision: Decision
    masks_seeds: tuple[int | None, ...]  # one per image, as a split request's runs may differ in it; None: no masks
    queue_seconds: float  # until its first run began
    compute_seconds: float  # all its runs, in full: batch-mates are charged the same time
    batch_size: int  # images in the largest of its runs, batch-mates' included


class Computes(Protocol):
    """What a batcher needs of an engine. `input_shape` is (height, width, channels)."""

    @property
    def input_shape(self) -> tuple[int, int, int]: ...

    def run(self, images: Images) -> Run: ...


@dataclass(slots=True, eq=False)
class _Request:
    images: Images
    deadline: float | None
    submitted: float
    future: Future[Result] = field(default_factory=Future)
    taken: int = 0  # images already put into a run
    parts: list[Decision] = field(default_factory=list)
    masks_seeds: tuple[int | None, ...] = ()
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    batch_size: int = 0

    @property
    def left(self) -> int:
        return len(self.images) - self.taken

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled, or failed before
            self.future.set_exception(error)

    def succeed(self) -> None:
        decision = self.parts[0] if len(self.parts) == 1 else _joined(self.parts)
        result = Result(decision, self.masks_seeds, self.queue_seconds, self.compute_seconds, self.batch_size)
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)


@dataclass(frozen=True, slots=True)
class _Share:
    """A request's part of a batch."""

    request: _Request
    images: Images


class Batcher:
    """Thread-safe `submit`; one thread of its own that computes."""

    def __init__(
        self,
        engine: Computes,
        limits: BatchingConfig,
        metrics: EnsembleMetrics,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._limits, self._metrics, self._clock = engine, limits, metrics, clock
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()  # None: look at _draining
        self._lock = threading.Lock()  # guards _backlog, _running, _waiting and _draining
        self._backlog: deque[_Request] = deque()  # out of the inbox, not yet wholly put into runs
        self._running: Sequence[_Share] = ()
        self._waiting = 0  # images submitted and not yet put into a run
        self._draining = False
        self._seconds_per_image = 0.0  # running mean; 0 before the first run
        self._last_requests, self._last_end = 0, 0.0
        metrics.watch_queue(lambda: self._waiting)
        self._thread = threading.Thread(target=self._serve, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Images waiting for a run."""
        return self._waiting

    def submit(self, images: Images, deadline: float | None = None) -> Future[Result]:
        """Queue images (n, height, width, channels), n >= 1; `deadline` is a time of the clock (time.monotonic).

        Cancelling the future takes what is not yet computed out of the queue.  Raises QueueFull, DeadlineExceeded or
        Draining at once; the future raises DeadlineExceeded, Draining, or what the engine raised.
        """
        n, limit, shape = len(images), self._limits.max_queue, self._engine.input_shape
        if n == 0 or images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"expected at least one uint8 image {shape}, got {images.dtype} {images.shape}")
        request = _Request(images, deadline, self._clock())
        with self._lock:
            if self._draining:
                raise Draining("this server is shutting down")
            wait = self._waiting * self._seconds_per_image
            if deadline is not None and request.submitted + wait >= deadline:
                left = max(deadline - request.submitted, 0)
                raise DeadlineExceeded(f"{left:.3f} s are left, and the work queued before takes about {wait:.3f} s")
            # A request larger than the whole queue may enter an empty one: told to come back later, it would for ever.
            if self._waiting and self._waiting + n > limit:
                raise QueueFull(n, self._waiting, limit, max(wait, 0.001))
            self._waiting += n
            self._inbox.put(request)
        return request.future

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more work and finish what is queued.  False if `timeout` seconds are too few: the rest then fails."""
        with self._lock:
            self._draining = True
            self._inbox.put(None)
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._lock:
            self._receive_all()
            abandoned = [*self._backlog, *(share.request for share in self._running)]
            self._backlog.clear()
            self._waiting = 0
        for request in abandoned:
            request.fail(Draining("this server shut down before the request was computed"))
        return False

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._receive_all()
                finished = self._draining and not self._backlog
            if finished:
                return
            if not self._backlog:
                self._receive(None)
                continue
            self._wait_for_company()
            if batch := self._take():
                self._compute(batch)

    def _receive(self, seconds: float | None) -> bool:
        """Move one request from the inbox to the backlog, waiting for it at most so long, or without end."""
        try:
            request = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return False
        if request is not None:
            with self._lock:
                self._backlog.append(request)
        return True

    def _receive_all(self) -> None:
        """Move what the inbox holds; the caller holds the lock."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (request := self._inbox.get_nowait()) is not None:
                    self._backlog.append(request)

    def _wait_for_company(self) -> None:
        """Wait for as many requests as were answered together last, no longer than `max_delay` after that."""
        until = self._last_end + self._limits.max_delay_ms / 1000
        while len(self._backlog) < self._last_requests and not self._draining:
            left = until - self._clock()
            full = sum(request.left for request in self._backlog) >= self._limits.max_batch_size
            hurried = any(request.deadline is not None and request.deadline < until for request in self._backlog)
            if left <= 0 or full or hurried or not self._receive(left):
                return

    def _take(self) -> list[_Share]:
        """A batch from the backlog, in its order; leaves out who does not wait any more."""
        batch: list[_Share] = []
        expired: list[_Request] = []
        room, now = self._limits.max_batch_size, self._clock()
        with self._lock:
            while self._backlog and room:
                request = self._backlog.popleft()
                if request.future.done() or (request.deadline is not None and request.deadline <= now):
                    self._waiting -= request.left
                    expired.append(request)
                    continue
                n = min(room, request.left)
                batch.append(_Share(request, request.images[request.taken : request.taken + n]))
                if request.taken == 0:
                    request.queue_seconds = now - request.submitted
                request.taken += n
                self._waiting -= n
                room -= n
                if request.left:
                    self._backlog.append(request)  # the room is used up: whoever waits behind it comes first next time
            self._running = batch
        for request in expired:
            request.fail(DeadlineExceeded(f"the deadline passed after {now - request.submitted:.3f} s in the queue"))
        return batch

    def _compute(self, batch: Sequence[_Share]) -> None:
        """One run; whatever goes wrong in it is the answer of its requests, and of nobody else."""
        try:
            images = batch[0].images if len(batch) == 1 else np.concatenate([share.images for share in batch])
            began = self._clock()
            run = self._engine.run(images)
            self._last_end = self._clock()
            self._last_requests = len(batch)
            seconds = self._last_end - began
            recent = seconds / len(images)
            self._seconds_per_image += (recent - self._seconds_per_image) * (0.2 if self._seconds_per_image else 1.0)
            self._deliver(batch, run, len(images), seconds)
            self._metrics.run(run.decision)
        except Exception as error:
            log.exception("a run of %d requests failed", len(batch))
            for share in batch:
                share.request.fail(error)
        finally:
            self._running = ()

    def _deliver(self, batch: Sequence[_Share], run: Run, images: int, seconds: float) -> None:
        start = 0
        for share in batch:
            request, n = share.request, len(share.images)
            request.parts.append(run.decision if n == images else _sliced(run.decision, start, start + n))
            request.masks_seeds += (run.masks_seed,) * n
            request.compute_seconds += seconds
            request.batch_size = max(request.batch_size, images)
            start += n
            if not request.left:
                request.succeed()
                self._metrics.queue(request.queue_seconds)
                self._metrics.compute(request.compute_seconds)


def _sliced(decision: Decision, start: int, stop: int) -> Decision:
    return Decision(*[getattr(decision, column)[start:stop] for column in _COLUMNS])


def _joined(parts: Sequence[Decision]) -> Decision:
    return Decision(*[np.concatenate([getattr(part, column) for part in parts]) for column in _COLUMNS])
