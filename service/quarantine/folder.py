"""Where images in quarantine lie: bounded, the oldest evicted first, every file whole or not there.

Threads and processes share the folder. Who writes holds the lock of the file `.lock`, which also says how much lies there, of
what time the newest is, and the folder's time of change then: as long as that is still its time, nobody else was here, and nothing
has to be counted. What is written last has the latest name, whatever the clock says.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from models.durable import PARTIAL, replace_file
from service.quarantine.entry import is_name, later, time_of

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
FREED = 16  # whoever makes room frees this part of the bound, so that files are seldom counted


@dataclass(frozen=True)
class Held:
    bytes: int
    evicted: int = 0


@dataclass(frozen=True)
class Folder:
    """Safe to share, and to have several times. Whatever is done raises OSError where the disk refuses it."""

    path: Path
    most_bytes: int

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def tidy(self) -> Held:
        """As after each write: within the bound, and nothing there of a writer that was killed."""
        with self._locked() as lock:
            return self._make_room(lock)

    def keep(self, name: str, content: bytes) -> Held:
        """Nothing is evicted for what cannot be written."""
        with self._locked() as lock:
            held, newest, stamp = _read(lock)
            if stamp != self._stamp():
                held, newest = _summed(self._count())
            _note(lock, held, newest, 0)  # a kill from here on makes the next one count
            name = later(name, newest)
            replace_file(self.path / name, content, mode=0o600)
            held += len(content)
            if held > self.most_bytes:
                return self._make_room(lock)
            _note(lock, held, time_of(name), self._stamp())
            return Held(held)

    def noted(self) -> int:
        """How much lay there after the last write, without waiting for a lock."""
        try:
            with (self.path / LOCK).open("rb", buffering=0) as lock:
                return _read(lock)[0]
        except FileNotFoundError:
            return 0

    def _make_room(self, lock: FileIO) -> Held:
        """Count what is there; of more than the bound evict the oldest, but never the last one."""
        found = self._count()
        (held, newest), evicted = _summed(found), 0
        enough = self.most_bytes - self.most_bytes // FREED if held > self.most_bytes else held
        for name, size in found[:-1]:
            if held <= enough:
                break
            with contextlib.suppress(OSError):  # one that cannot be removed lets others stay no longer
                (self.path / name).unlink(missing_ok=True)
                held -= size
                evicted += 1
        _note(lock, held, newest, self._stamp())
        return Held(held, evicted)

    def _count(self) -> list[tuple[str, int]]:
        """All entries with their sizes, the oldest first. Under the lock nobody writes: what is partial is left of a kill."""
        found = []
        with os.scandir(self.path) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # an operator may be here
                    if is_name(file.name):
                        found.append((file.name, file.stat().st_size))
                    elif is_name(file.name.removesuffix(PARTIAL)):
                        (self.path / file.name).unlink()
        return sorted(found)

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        while True:
            self.make()
            with open(self.path / LOCK, "r+b", buffering=0, opener=_created) as lock:  # closing unlocks
                if sys.platform != "win32":  # there a server is one process, and one thread of it writes
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if self._has(lock):
                    yield lock
                    return

    def _has(self, lock: FileIO) -> bool:
        """False where the folder was removed while somebody waited: another one may have its place, and a lock of its own."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self.path / LOCK).stat())
        except FileNotFoundError:
            return False

    def _stamp(self) -> int:
        return self.path.stat().st_mtime_ns


def entries(folder: Path) -> list[Path]:
    """The oldest first; none where there is no folder."""
    try:
        return sorted((path for path in folder.iterdir() if is_name(path.name)), key=lambda path: path.name)
    except FileNotFoundError:
        return []


def _created(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CREAT, 0o600)


def _summed(found: Sequence[tuple[str, int]]) -> tuple[int, str]:
    """Bytes, and the time of the newest; empty where there is none."""
    return sum(size for _, size in found), time_of(found[-1][0]) if found else ""


def _read(lock: FileIO) -> tuple[int, str, int]:
    """Bytes, the time of the newest, and the folder's stamp with which they hold; 0 with none."""
    try:
        held, newest, stamp = lock.read(80).split()
        return int(held), newest.decode(), int(stamp)
    except ValueError:  # new
        return 0, "", 0


def _note(lock: FileIO, held: int, newest: str, stamp: int) -> None:
    """Always as long, so that a full disk has place for it."""
    lock.seek(0)
    lock.write(b"%20d %23s %20d\n" % (held, newest.encode(), stamp))
