"""Keeps entries in a process that is killed, in another place every time; test_quarantine runs it.

    python -m tests.service.killed_keeper FOLDER

Prints in how many places.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from models import durable
from models.durable import PARTIAL
from service.quarantine import folder as folders
from service.quarantine.folder import Folder, entries

CONTENT, MOST = bytes(1000), 4


def kill_at_line(number: int) -> None:
    """Have this process killed before the number-th line that it runs of what writes."""
    lines = count()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in (folders.__file__, durable.__file__):
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def keep(folder: Folder, number: int) -> None:
    """The later ones have greater numbers."""
    folder.keep(f"20260101T000000.{number:06}Z-suspect-00000000.png", CONTENT)


def killed(folder: Folder, number: int, line: int) -> bool:
    """False once there are no more lines."""
    if (child := os.fork()) == 0:
        kill_at_line(line)
        keep(folder, number)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def check(folder: Folder, most: int) -> int:
    """The bytes there, of entries that are whole and no more than so many."""
    sizes = [path.stat().st_size for path in entries(folder.path)]
    assert set(sizes) <= {len(CONTENT)}, sizes
    assert len(sizes) <= most, sizes
    return sum(sizes)


def main(path: Path) -> None:
    folder, numbers = Folder(path, MOST * len(CONTENT)), count()
    for line in count():
        while len(entries(path)) < MOST:
            keep(folder, next(numbers))
        if not killed(folder, next(numbers), line):
            print(line)
            return
        check(folder, MOST + 1)  # room was not yet made for what was written last
        keep(folder, next(numbers))
        assert folder.noted() == check(folder, MOST), line
        assert not list(path.glob(f"*{PARTIAL}")), line


if __name__ == "__main__":
    main(Path(sys.argv[1]))
