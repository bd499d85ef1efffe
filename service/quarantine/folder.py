"""Where images in quarantine lie: bounded, the oldest evicted first, every file whole or not there.

Each process has a part of the folder to itself, `part-0`, `part-1` and so on, and an equal share of its bytes: nobody evicts what
another has just written, and nobody has to count what others write. Whoever starts takes the first part that is free, with
what is in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from models.durable import PARTIAL, replace_file
from service.quarantine.entry import SUFFIX, Entry

if sys.platform != "win32":
    import fcntl

PART = re.compile(r"part-(\d+)")


class Part:
    """One process's part of the folder. Not thread-safe."""

    def __init__(self, folder: Path, parts: int, most_bytes: int) -> None:
        """`most_bytes` of all parts together; raises OSError where the folder cannot be had."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path, self._lock = _free_part(folder)
        self._most = most_bytes // parts
        for leftover in self._path.glob(f"*{PARTIAL}"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        if self._path.name == "part-0":
            _adopt(folder, self._path, parts)
        found = sorted((path.name, path.stat().st_size) for path in entries_of(self._path))
        self._files = deque(found)
        self.bytes = sum(size for _, size in found)

    def keep(self, entry: Entry) -> int:
        """Write an entry; how many old ones made room for it. Raises OSError, and what was there stays: nothing is evicted for
        an entry that cannot be written.
        """
        name, content = entry.file_name(), entry.encode()
        replace_file(self._path / name, content)
        self._files.append((name, len(content)))
        self.bytes += len(content)
        evicted = 0
        while self.bytes > self._most and len(self._files) > 1:
            oldest, size = self._files.popleft()
            (self._path / oldest).unlink(missing_ok=True)  # an operator may have been here
            self.bytes -= size
            evicted += 1
        return evicted

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which unlocks


def entries(folder: Path) -> list[Path]:
    """All files that may be entries, the oldest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    parts = [path for path in folder.iterdir() if PART.fullmatch(path.name) and path.is_dir()]
    return sorted((path for part in parts for path in entries_of(part)), key=lambda path: path.name)


def entries_of(part: Path) -> Iterator[Path]:
    return (path for path in part.iterdir() if path.suffix == SUFFIX and not path.name.startswith("."))


def _free_part(folder: Path) -> tuple[Path, int | None]:
    """The first that nobody has, locked as long as its descriptor is open; on Windows a server is one process and needs no lock."""
    number = 0
    while True:
        path = folder / f"part-{number}"
        path.mkdir(exist_ok=True, mode=0o700)
        if sys.platform == "win32":
            return path, None
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            number += 1
        except OSError:
            os.close(descriptor)
            raise
        else:
            return path, descriptor


def _adopt(folder: Path, own: Path, parts: int) -> None:
    """Take over what lies in parts that nobody will have: there were more processes once."""
    for other in folder.iterdir():
        number = PART.fullmatch(other.name)
        if number and int(number[1]) >= parts:
            for path in entries_of(other):
                with contextlib.suppress(FileNotFoundError):
                    path.rename(own / path.name)
