"""Puts suspect and rejected images into quarantine while the server answers: a witness, and a thread that writes."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime

from models.ensemble import Decision, Verdict
from service.batch import sliced
from service.codec import Answers
from service.config import Disclosure, QuarantineConfig
from service.metrics import QuarantineMetrics
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.quarantine.entry import Entry, now
from service.quarantine.folder import Folder, Held
from service.seldom import Seldom
from service.witnesses import Answered

log = logging.getLogger(__name__)

MOST_WAITING = 256  # images; of more that come at once the rest is dropped, and counted
LOOK_SECONDS = 15.0  # how old the gauge may be where only others write
QUIET_SECONDS = 60.0  # between two lines about errors that nobody foresaw


@dataclass(frozen=True, slots=True)
class _Waiting:
    time: datetime
    answered: Answered  # all of one call that are kept, copied out of its batch
    row: int


class CannotKeep(RuntimeError):
    """What the configuration names can be no folder."""


class Keeper:
    """Never makes an answer wait, and never fails one: what cannot be kept is dropped and counted."""

    def __init__(self, config: QuarantineConfig, metrics: QuarantineMetrics, look_seconds: float = LOOK_SECONDS) -> None:
        """Raises CannotKeep for a mistake; a disk that refuses, as it may at any time, is told in the log and tried again."""
        self._folder, self._metrics, self._look_seconds = Folder(config.folder, config.max_bytes), metrics, look_seconds
        _refuse_a_file(self._folder)
        self._wanted = frozenset(int(Verdict[name.upper()]) for name in config.verdicts)
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(MOST_WAITING)  # None: no more will come
        self._refused = False  # whether the disk took nothing last time
        self._unforeseen, self._told_in_full = Seldom(), False  # errors; whether the first was told
        self._thread = threading.Thread(target=self._write_all, name="quarantine", daemon=True)
        self._thread.start()

    def saw(self, answered: Answered) -> None:
        """Nothing is copied of what has no room."""
        rows = [row for row, verdict in enumerate(answered.result.decision.verdict.tolist()) if verdict in self._wanted]
        taken = rows[: max(0, MOST_WAITING - self._waiting.qsize())]
        dropped = len(rows) - len(taken)
        copied = _copied(answered, taken) if taken else answered
        for row in range(len(taken)):
            try:
                self._waiting.put_nowait(_Waiting(now(), copied, row))
            except queue.Full:  # another thread was quicker
                dropped += 1
        if dropped:
            self._metrics.dropped("queue_full", dropped)

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
        with self._forgiven(images=0):
            self._count(self._folder.tidy())
        while True:
            try:
                waiting = self._waiting.get(timeout=self._look_seconds)
            except queue.Empty:
                with contextlib.suppress(OSError):
                    self._metrics.holds(self._folder.noted())
                continue
            if waiting is None:
                return
            with self._forgiven(images=1):
                entry = _entry(waiting)
                self._count(self._folder.keep(entry.file_name(), entry.encode(waiting.answered.images[waiting.row])))
                self._metrics.kept(waiting.answered.result.decision.verdict[waiting.row])
            self._waiting.task_done()

    def _count(self, held: Held) -> None:
        self._metrics.holds(held.bytes)
        self._metrics.evicted(held.evicted)

    @contextmanager
    def _forgiven(self, images: int) -> Iterator[None]:
        """Whatever goes wrong costs so many images, and is told."""
        try:
            yield
            self._tell(None)
        except OSError as error:
            self._metrics.dropped("disk", images)
            self._tell(error)
        except Exception as error:
            self._metrics.dropped("internal", images)
            self._tell_unforeseen(error)

    def _tell(self, error: OSError | None) -> None:
        """Once when the disk begins to refuse, and once when it takes again."""
        if error is not None and not self._refused:
            log.error(
                "quarantine: cannot write to %s: %s; images are dropped until it can", self._folder.path, error.strerror or error
            )
        elif error is None and self._refused:
            log.info("quarantine: %s takes images again", self._folder.path)
        self._refused = error is not None

    def _tell_unforeseen(self, error: Exception) -> None:
        """The first in full, and then a line from time to time: a fault of ours may come with each image."""
        due = self._unforeseen.due(1, QUIET_SECONDS)
        if not self._told_in_full:
            log.error("quarantine: an image that could not be written", exc_info=error)
            self._told_in_full = True
        elif due:
            log.error("quarantine: %d more that could not be written, at last for %r", due, error)


def _refuse_a_file(folder: Folder) -> None:
    with contextlib.suppress(OSError):  # whoever writes says so
        try:
            folder.make()
        except (FileExistsError, NotADirectoryError):
            if file := next((path for path in (folder.path, *folder.path.parents) if path.is_file()), None):
                raise CannotKeep(
                    f"quarantine.folder: expected a folder, or a place for one, got {folder.path}: {file} is a file"
                ) from None


def _copied(answered: Answered, rows: Sequence[int]) -> Answered:
    """Some images of an answer, and nothing that keeps the others in memory."""
    result = answered.result
    decision = Decision(*[getattr(result.decision, column.name)[rows] for column in fields(Decision)])
    seeds = tuple(result.masks_seeds[row] for row in rows)
    return replace(answered, images=answered.images[rows], result=replace(result, decision=decision, masks_seeds=seeds))


def _entry(waiting: _Waiting) -> Entry:
    answered, row, seen = waiting.answered, waiting.row, pb.Classification()
    result, here = answered.result, slice(row, row + 1)
    alone = replace(result, decision=sliced(result.decision, row, row + 1), masks_seeds=result.masks_seeds[here])
    Answers(alone, answered.names, Disclosure.EVIDENCE).write(0, seen, resized=False)
    return Entry(waiting.time, answered.caller, answered.request_id, answered.ensemble, answered.bundle_version, seen)
