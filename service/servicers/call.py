"""One call as it stands: who asks, what is on offer to it, and the way of its images through the queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from service.access import Caller
from service.batcher import DeadlineExceeded, Result
from service.codec import disclosure
from service.config import Disclosure
from service.context import Context
from service.engine import Stop
from service.errors import request_id_of
from service.quota import Quota
from service.servicers.catalogue import Catalogue, Served
from service.witnesses import Answered

if TYPE_CHECKING:
    from service.tracing import Trace  # the extra `tracing`

WORTH_STOPPING = 8  # images of a lone call, some hundredth of a second
WAITED_TOO_LONG = "the deadline passed while the images waited or were computed"


@dataclass(slots=True)
class Call:
    """One call: what was on offer when it began, and who asks."""

    catalogue: Catalogue
    caller: Caller
    quota: Quota
    context: Context
    deadline: float | None  # on the monotonic clock
    verdicts: NDArray[np.int64] | None = None  # of its images, once they are computed
    paid: bool = False
    known_as: str = ""
    trace: Trace | None = None

    @property
    def request_id(self) -> str:
        """What the caller calls it, or a name of ours, which stays."""
        self.known_as = self.known_as or request_id_of(self.context)
        return self.known_as

    def ensemble(self, name: str) -> Served:
        """The ensemble of this name, or the default one for none, if the caller may ask it."""
        self.caller.check_ensemble(name or self.catalogue.default.name)
        return self.catalogue.find(name)

    def disclosure(self, asked: int, served: Served) -> Disclosure:
        """How much of an answer is told."""
        return disclosure(asked, self.caller.disclosure(served.name))

    def decoded(self, served: Served, began: float) -> None:
        """Images were read; `began` is of time.perf_counter()."""
        self._stage("decode", served.metrics.decode, began)

    def encoded(self, served: Served, began: float) -> None:
        self._stage("encode", served.metrics.encode, began)

    def _stage(self, name: str, observe: Callable[[float], None], began: float) -> None:
        ended = time.perf_counter()
        observe(ended - began)
        if self.trace is not None:
            self.trace.stage(name, began, ended)

    def spend(self, images: int) -> None:
        """Charge the caller's quota, once: work that a reload makes begin again is paid for already."""
        if not self.paid:
            self.quota.spend(images)
            self.paid = True

    def submit(self, served: Served, images: NDArray[np.uint8]) -> Future[Result]:
        """Queue images; they leave the queue when the caller's deadline passes."""
        return served.loaded.batcher.submit(images, self.deadline, self.caller.turn)

    def compute(self, served: Served, images: NDArray[np.uint8]) -> Result:
        """The answers to images: at once where nobody else is about, else through the queue, which they leave with the caller."""
        stop = Stop() if len(images) >= WORTH_STOPPING else None
        if stop is not None:
            self.context.add_callback(stop.now)
        result = served.loaded.batcher.compute_now(images, self.deadline, stop)
        if result is None:
            future = self.submit(served, images)
            self.give_up_with_caller(future)
            result = self.wait(future)
        self.answered(served, images, result)
        return result

    def give_up_with_caller(self, future: Future[Result]) -> None:
        """Take out of the queue what the caller does not wait for any more."""

        def give_up() -> None:
            future.cancel()

        if not self.context.add_callback(give_up):
            give_up()

    def answered(self, served: Served, images: NDArray[np.uint8], result: Result) -> None:
        """Take note of the answers to all images of the call, and let those look who look on."""
        self.verdicts = result.decision.verdict
        if self.trace is not None:
            self.trace.then("queue", result.queue_seconds)
            self.trace.then("compute", result.compute_seconds)
        if served.witnesses:
            seen = Answered(served.name, served.bundle_version, served.names, images, result, self.caller.name, self.request_id)
            for witness in served.witnesses:
                witness.saw(seen)

    def ended(self, served: Served, images: NDArray[np.uint8], future: Future[Result]) -> Result:
        """The answers to all images of the call, of which the future is done."""
        try:
            result = future.result(0)
        except CancelledError:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise DeadlineExceeded(WAITED_TOO_LONG) from None
            raise
        self.answered(served, images, result)
        return result

    def wait(self, future: Future[Result]) -> Result:
        """The answers to what was submitted, or DeadlineExceeded; what nobody waits for any more leaves the queue."""
        try:
            return future.result(None if self.deadline is None else max(0.0, self.deadline - time.monotonic()))
        except TimeoutError:
            if not future.cancel() and future.done():  # it ended just now, or the work itself raised it
                return future.result()
            raise DeadlineExceeded(WAITED_TOO_LONG) from None
