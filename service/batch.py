"""What travels through a batcher: a request, its part of a batch, and what becomes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, fields

import numpy as np

from models.ensemble import Decision
from service.engine import Images, Run, Stop

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


@dataclass(slots=True, eq=False)
class Request:
    images: Images
    deadline: float | None
    submitted: float
    caller: str = ""  # whose; empty where callers are not told apart
    future: Future[Result] = field(default_factory=Future)
    taken: int = 0  # images already put into a run
    forgotten: bool = False  # what is left does not count as waiting any more
    parts: dict[int, Run] = field(default_factory=dict)  # by their first image: they may be answered in any order
    answered: int = 0  # images
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
        runs = [self.parts[start] for start in sorted(self.parts)]
        decision = runs[0].decision if len(runs) == 1 else joined([run.decision for run in runs])
        seeds = tuple(run.masks_seed for run in runs for _ in range(len(run.decision.label)))
        result = Result(decision, seeds, self.queue_seconds, self.compute_seconds, self.batch_size)
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)


@dataclass(frozen=True, slots=True)
class Share:
    """A request's part of a batch: its images from `start` on."""

    request: Request
    start: int
    images: Images


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A batch that is being computed; without shares where a caller computes its images by itself."""

    size: int  # images
    began: float
    shares: Sequence[Share] = ()
    stop: Stop | None = None

    @property
    def images(self) -> Images:
        return self.shares[0].images if len(self.shares) == 1 else np.concatenate([share.images for share in self.shares])

    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return bool(self.shares) and all(share.request.future.done() for share in self.shares)


def book(batch: Sequence[Share], run: Run, seconds: float) -> list[Request]:
    """Give every request its rows of a run that took so long; those are returned that now have all, to `succeed`."""
    images = len(run.decision.label)
    finished: list[Request] = []
    row = 0
    for share in batch:
        request, n = share.request, len(share.images)
        own = run if n == images else Run(sliced(run.decision, row, row + n), run.masks_seed)
        request.parts[share.start] = own
        request.answered += n
        request.compute_seconds += seconds
        request.batch_size = max(request.batch_size, images)
        row += n
        if request.answered == len(request.images):
            finished.append(request)
    assert row == images, f"{row} images in, {images} answers out"
    return finished


def sliced(decision: Decision, start: int, stop: int) -> Decision:
    """The rows from `start` to `stop`: views."""
    return Decision(*[getattr(decision, column)[start:stop] for column in _COLUMNS])


def joined(parts: Sequence[Decision]) -> Decision:
    """The rows of all parts, in their order."""
    return Decision(*[np.concatenate([getattr(part, column) for part in parts]) for column in _COLUMNS])
