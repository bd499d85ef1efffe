"""One queue in front of one engine: requests wait here and nowhere else, and are computed together.

A run takes a lane (service/engine.py). Who finds a lane free and nobody to wait for computes in its own thread
(`compute_now`): the way to the queue's thread and back would cost a lone caller more than it could gain. Everybody else
queues (`submit`).

When does a batch start? While all lanes are taken, requests gather; when one is free, its part of them goes at once. A request
that finds a lane free waits only for callers who were answered together a moment ago and are likely to come back: until as many
requests wait as the last run answered or left waiting, but no longer than `max_delay` after that run. So a lone caller never
waits, and callers who are answered together are computed together again.

A large request is split into runs, which other lanes may compute at the same time, and rejoined; it goes to the back of the
queue after each, so that the requests behind it wait for one run and not for all of it. Callers who are known take turns
(service/fair_queue.py). A run that nobody waits for any more is stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Protocol

import numpy as np

from service.batch import DeadlineExceeded, Draining, Flight, QueueFull, Request, Result, Share, book
from service.config import BatchingConfig
from service.engine import Images, Lanes, Run, Stop, Stopped
from service.fair_queue import FairQueue, Holdings
from service.metrics import Closed, EnsembleMetrics

__all__ = ["Batcher", "Computes", "DeadlineExceeded", "Draining", "QueueFull", "Result"]

log = logging.getLogger(__name__)


class Computes(Protocol):
    """What a batcher needs of an engine. `input_shape` is (height, width, channels)."""

    lanes: Lanes
    most_at_once: int  # images that are worth to be in one run

    @property
    def input_shape(self) -> tuple[int, int, int]: ...

    def run(self, images: Images, *, stop: Stop | None = None) -> Run: ...


class Batcher:
    """Thread-safe; one thread of its own that makes batches."""

    def __init__(
        self,
        engine: Computes,
        limits: BatchingConfig,
        metrics: EnsembleMetrics,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._limits, self._metrics, self._clock = engine, limits, metrics, clock
        self._lanes = engine.lanes
        self._most = min(limits.max_batch_size, engine.most_at_once)  # images of one run
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()  # None: look at _draining
        self._lock = threading.Lock()  # guards _backlog, _flights, _waiting and _draining
        self._backlog = FairQueue()  # out of the inbox, not yet wholly put into runs
        self._flights: set[Flight] = set()  # being computed
        self._landed = threading.Condition(self._lock)
        self._waiting = Holdings(limits.max_queue)  # images submitted and not yet put into a run
        self._draining = False
        self._seconds_per_image = 0.0  # of one lane, running mean; 0 before the first run
        self._last_requests, self._last_end = 0, 0.0  # answered by the last run or waiting at its end; when that was
        self._disappointments, self._impatient = 0, 0  # waits in vain in a row; runs not to wait before, on that account
        self._thread = threading.Thread(target=self._serve, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    def depth(self) -> int:
        """Images that wait for a run."""
        return self._waiting.total

    def submit(self, images: Images, deadline: float | None = None, caller: str = "") -> Future[Result]:
        """Queue images (n, height, width, channels), n >= 1; `deadline` is a time of the clock (time.monotonic).

        Cancelling the future takes what is not yet computed out of the queue; `caller` is whose turn it takes. Raises
        QueueFull, DeadlineExceeded or Draining at once; the future raises DeadlineExceeded, Draining, or what the engine
        raised.
        """
        self._check(images)
        request = Request(images, deadline, self._clock(), caller)
        n = len(images)
        with self._lock:
            self._refuse_if_draining()
            wait = self._seconds_ahead(request.submitted)
            if deadline is not None:
                own = math.ceil(n / self._lanes.count) * self._seconds_per_image
                self._refuse_if_late(deadline - request.submitted, wait, own)
            if not self._waiting.has_room(caller, n):
                raise QueueFull(n, self._waiting.total, self._limits.max_queue, max(wait, 0.001))
            self._waiting.add(caller, n)
            self._inbox.put(request)
        request.future.add_done_callback(partial(self._given_up, request))
        return request.future

    def compute_now(self, images: Images, deadline: float | None = None, stop: Stop | None = None) -> Result | None:
        """Compute in the caller's own thread what need not wait for anybody and what no two lanes could share; None where it
        must: then `submit`.

        Raises DeadlineExceeded where `deadline`, a time of the clock, would pass before the end; Draining; CancelledError
        where `stop` ended it; or what the engine raised.
        """
        self._check(images)
        n = len(images)
        alone = n <= self._most and (n == 1 or self._lanes.count == 1) and self._company() <= 1 and not self._waiting.total
        if not alone or not self._lanes.enter(wait=False):
            return None
        flight = Flight(n, self._clock(), stop=stop)
        try:
            with self._lock:
                self._refuse_if_draining()
                if deadline is not None:
                    self._refuse_if_late(deadline - flight.began, 0.0, n * self._seconds_per_image)
                self._flights.add(flight)
            run, seconds = self._run(images, 1, stop)
        except Stopped:
            raise CancelledError from None
        finally:
            self._land(flight)
        self._measure(run, [(0.0, seconds)])
        return Result(run.decision, (run.masks_seed,) * n, 0.0, seconds, n)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more work and finish what there is.  False if `timeout` seconds are too few: the rest then fails."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._draining = True
            self._inbox.put(None)
        self._thread.join(timeout)
        with self._landed:
            self._landed.wait_for(lambda: not self._flights, None if end is None else max(0.0, end - time.monotonic()))
            self._receive_all()
            flights = [flight for flight in self._flights if flight.shares]
            abandoned = [*self._backlog, *(share.request for flight in flights for share in flight.shares)]
            finished = not self._flights and not abandoned
            self._backlog.clear()
            self._waiting.clear()
            self._inbox.put(None)  # the thread's own may just have been received here
        for request in abandoned:
            request.fail(Draining("this server shut down before the request was computed"))
        for flight in flights:  # after that: who finds its run stopped takes its callers for gone
            if flight.stop is not None:
                flight.stop.now()
        return finished

    def _check(self, images: Images) -> None:
        shape = self._engine.input_shape
        if len(images) == 0 or images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"expected at least one uint8 image {shape}, got {images.dtype} {images.shape}")

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise Draining("this server is shutting down")

    def _seconds_ahead(self, now: float) -> float:
        """Until the lanes have computed what waits and what is under way; the caller holds the lock."""
        each = self._seconds_per_image
        under_way = sum(max(0.0, flight.began + flight.size * each - now) for flight in self._flights)
        return (self._waiting.total * each + under_way) / self._lanes.count

    def _refuse_if_late(self, left: float, ahead: float, own: float) -> None:
        """Where fewer seconds are left than the work ahead and its own take; the caller holds the lock."""
        if left > ahead + own:
            return
        if not ahead:
            self._seconds_per_image *= 0.9  # no run is to come from which to learn: one slow one must not refuse everybody for good
        raise DeadlineExceeded(
            f"{max(left, 0):.3f} s are left, and the work takes about {own:.3f} s, after {ahead:.3f} s for what came before "
            f"({self._waiting.total} images wait)"
        )

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
            self._lanes.await_free()
            closed = self._wait_for_company()
            self._lanes.enter()
            flight = self._take()
            if flight is None:
                self._lanes.leave()
            else:
                self._metrics.closed(closed)
                self._dispatch(flight)

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

    def _company(self) -> int:
        """How many requests are worth waiting for: those of a moment ago, answered or waiting then; 1 is nobody else."""
        recent = self._clock() < self._last_end + self._limits.max_delay_ms / 1000
        return self._last_requests if recent and not self._impatient else 1

    def _wait_for_company(self) -> Closed:
        """Wait for whom it is worth to wait; why it ended."""
        until = self._last_end + self._limits.max_delay_ms / 1000
        company = self._company()
        self._impatient = max(0, self._impatient - 1)
        while len(self._backlog) < company and not self._draining:
            left = until - self._clock()
            full = sum(request.left for request in self._backlog) >= self._most * self._lanes.count
            hurried = any(request.deadline is not None and request.deadline < until for request in self._backlog)
            if full or hurried:
                return Closed.FULL if full else Closed.DEADLINE
            if left <= 0 or not self._receive(left):
                self._disappointments = min(self._disappointments + 1, 6)
                self._impatient = 2**self._disappointments - 1
                return Closed.DELAY
        if company > 1:
            self._disappointments = 0
        return Closed.READY

    def _take(self) -> Flight | None:
        """A batch from what has arrived: no more than a lane's part of all that is waiting or being computed, so that no lane's
        callers wait much longer than another's; the same number of images for every caller who has as many waiting, each
        caller's in their order; leaves out who does not wait any more.
        """
        batch: list[Share] = []
        expired: list[Request] = []
        now = self._clock()
        with self._lock:
            self._receive_all()
            everybody = self._waiting.total + sum(flight.size for flight in self._flights)
            room = min(self._most, max(1, math.ceil(everybody / self._lanes.count)))
            portion = max(1, room // max(1, self._backlog.callers))
            while self._backlog and room:
                with self._backlog.turn() as requests:
                    room -= self._portion(requests, min(portion, room), now, batch, expired)
            flight = Flight(sum(len(share.images) for share in batch), now, batch, Stop()) if batch else None
            if flight is not None:
                self._flights.add(flight)
                self._last_requests -= len(batch)  # of those who are likely to come, these did
        for request in expired:
            request.fail(DeadlineExceeded(f"the deadline passed after {now - request.submitted:.3f} s in the queue"))
        return flight

    def _portion(self, requests: deque[Request], most: int, now: float, batch: list[Share], expired: list[Request]) -> int:
        """Move at most so many images of one caller's into the batch; how many it were. The caller holds the lock."""
        left, rest = most, list[Request]()
        while requests and left:
            request = requests.popleft()
            if request.future.done() or (request.deadline is not None and request.deadline <= now):
                self._forget(request)
                expired.append(request)
                continue
            n = min(left, request.left)
            batch.append(Share(request, request.taken, request.images[request.taken : request.taken + n]))
            if request.taken == 0:
                request.queue_seconds = now - request.submitted
            request.taken += n
            self._waiting.remove(request.caller, n)
            left -= n
            if request.left:
                rest.append(request)  # whoever waits behind it comes first next time
        requests.extend(rest)
        return most - left

    def _forget(self, request: Request) -> None:
        """What is left of a request does not wait any more; the caller holds the lock."""
        if not request.forgotten:
            request.forgotten = True
            self._waiting.remove(request.caller, request.left)

    def _dispatch(self, flight: Flight) -> None:
        try:
            self._lanes.compute(partial(self._compute, flight))
        except RuntimeError as error:  # the system has no thread for us
            for share in flight.shares:
                share.request.fail(error)
            self._land(flight)

    def _compute(self, flight: Flight) -> None:
        """One run, in a lane; whatever goes wrong in it is the answer of its requests, and of nobody else."""
        shares = flight.shares
        try:
            run, seconds = self._run(flight.images, len(shares), flight.stop)
            with self._lock:
                finished = book(shares, run, seconds)
            for request in finished:
                request.succeed()
            self._measure(run, [(request.queue_seconds, request.compute_seconds) for request in finished])
        except Stopped:  # by the last who awaited it
            for share in shares:
                share.request.future.cancel()
        except Exception as error:
            log.exception("a run of %d requests failed", len(shares))
            for share in shares:
                share.request.fail(error)
        finally:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        """The run is over, and its lane free."""
        self._lanes.leave()
        with self._landed:
            self._flights.discard(flight)
            self._landed.notify_all()

    def _given_up(self, request: Request, future: Future[Result]) -> None:
        """A request ended; if it gave up, its place is free, and a run that nobody waits for any more is stopped."""
        if not future.cancelled():
            return
        with self._lock:
            self._forget(request)
            for flight in self._flights:
                if flight.stop is not None and flight.abandoned():
                    flight.stop.now()

    def _measure(self, run: Run, finished: Sequence[tuple[float, float]]) -> None:
        """A run, and the requests that are answered by it: their seconds in the queue, and of computing."""
        self._metrics.run(run.decision)
        for queued, computed in finished:
            self._metrics.queue(queued)
            self._metrics.compute(computed)

    def _run(self, images: Images, requests: int, stop: Stop | None = None) -> tuple[Run, float]:
        """The answers and the seconds they took; the caller has a lane."""
        began = self._clock()
        run = self._engine.run(images, stop=stop)
        ended = self._clock()
        with self._lock:
            self._last_end, self._last_requests = ended, requests + len(self._backlog) + self._inbox.qsize()
        seconds = ended - began
        recent = seconds / len(images)
        self._seconds_per_image += (recent - self._seconds_per_image) * (0.2 if self._seconds_per_image else 1.0)
        return run, seconds
