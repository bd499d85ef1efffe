"""Puts suspect and rejected images into quarantine while the server answers: a witness, and a thread that writes."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from models.ensemble import Verdict
from service.batch import Result, joined, sliced
from service.codec import Answers
from service.config import Disclosure, QuarantineConfig
from service.metrics import QuarantineMetrics
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.quarantine.entry import Entry, now
from service.quarantine.folder import Part
from service.witnesses import Answered

log = logging.getLogger(__name__)

MOST_WAITING = 256  # images; of more that come at once the rest is dropped, and counted


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One image, copied out of its batch."""

    time: datetime
    answered: Answered  # of this image alone


class CannotKeep(RuntimeError):
    """The folder cannot be had."""


class Keeper:
    """Never makes an answer wait, and never fails one: what cannot be kept is dropped and counted."""

    def __init__(self, config: QuarantineConfig, processes: int, metrics: QuarantineMetrics) -> None:
        """Raises OSError where the folder cannot be had: better at the start than once it is needed."""
        self._folder, self._metrics = config.folder, metrics
        self._part = Part(config.folder, processes, config.max_bytes)
        self._wanted = frozenset(int(Verdict[name.upper()]) for name in config.verdicts)
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(MOST_WAITING)  # None: no more will come
        self._refused = False  # whether the disk took nothing last time
        metrics.holds(self._part.bytes)
        self._thread = threading.Thread(target=self._write_all, name="quarantine", daemon=True)
        self._thread.start()

    def saw(self, answered: Answered) -> None:
        for row, verdict in enumerate(answered.result.decision.verdict.tolist()):
            if verdict in self._wanted:
                try:
                    self._waiting.put_nowait(_Waiting(now(), _alone(answered, row)))
                except queue.Full:
                    self._metrics.dropped("queue_full")

    def flush(self) -> None:
        """Return when all that was seen until now is written, or dropped."""
        self._waiting.join()

    def close(self, timeout: float) -> None:
        """Write what waits, for no longer than so many seconds; what is left is dropped. Nothing is seen any more."""
        end = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=timeout)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            log.warning("quarantine: what was seen last was not written in time")

    def _write_all(self) -> None:
        with contextlib.closing(self._part):
            self._write_each()

    def _write_each(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._metrics.evicted(self._part.keep(_entry(waiting)))
                self._metrics.kept(waiting.answered.result.decision.verdict[0])
                self._metrics.holds(self._part.bytes)
                self._tell(None)
            except OSError as error:
                self._metrics.dropped("disk")
                self._tell(error)
            except Exception:
                log.exception("quarantine: an image that could not be written")
                self._metrics.dropped("internal")
            finally:
                self._waiting.task_done()

    def _tell(self, error: OSError | None) -> None:
        """Once when the disk begins to refuse, and once when it takes again."""
        if error is not None and not self._refused:
            log.error("quarantine: cannot write to %s: %s; images are dropped until it can", self._folder, error.strerror or error)
        elif error is None and self._refused:
            log.info("quarantine: %s takes images again", self._folder)
        self._refused = error is not None


def _alone(answered: Answered, row: int) -> Answered:
    """One image of an answer, and nothing that keeps the others in memory."""
    result = answered.result
    decision = joined([sliced(result.decision, row, row + 1)])  # copies
    seeds = result.masks_seeds[row : row + 1]
    alone = Result(decision, seeds, result.queue_seconds, result.compute_seconds, result.batch_size)
    images: NDArray[np.uint8] = answered.images[row : row + 1].copy()
    return Answered(
        answered.ensemble, answered.bundle_version, answered.names, images, alone, answered.caller, answered.request_id
    )  # fmt: skip


def _entry(waiting: _Waiting) -> Entry:
    answered, seen = waiting.answered, pb.Classification()
    Answers(answered.result, answered.names, Disclosure.EVIDENCE).write(0, seen, resized=False)
    return Entry(
        waiting.time, answered.caller, answered.request_id, answered.ensemble, answered.bundle_version, seen, answered.images[0]
    )  # fmt: skip


def open_keeper(config: QuarantineConfig, processes: int, metrics: QuarantineMetrics) -> Keeper:
    """Raises CannotKeep with a sentence."""
    try:
        return Keeper(config, processes, metrics)
    except OSError as error:
        raise CannotKeep(f"quarantine.folder: cannot use {config.folder}: {error.strerror or error}") from None
