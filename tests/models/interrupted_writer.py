"""Replaces a bundle again and again, interrupted in another place every time; test_durable runs it.

    python -m tests.models.interrupted_writer kill|kill-without-exchange|full OLD NEW

OLD is the bundle that is replaced by what NEW holds.  Prints what was found afterwards, one word an interruption.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from models import durable
from models.bundle import InvalidBundle, read_bundle
from models.durable import leftover, replace_folder

Files = dict[str, bytes]


def content(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kill_at_line(number: int) -> None:
    """Have this process killed before the number-th line that it runs of models/durable.py."""
    lines = count()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != durable.__file__:
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def killed(path: Path, files: Files, number: int) -> bool:
    """Replace the folder in a child that is killed at a line; False once there are no more lines."""
    if (child := os.fork()) == 0:
        kill_at_line(number)
        replace_folder(path, files)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def found(path: Path, old: Files, new: Files) -> str:
    """Which bundle is at `path`, whole: `old`, `new`, or `aside` if the old one waits beside it."""
    if path.exists():
        now = content(path)
        assert now in (old, new)
        return "old" if now == old else "new"
    aside = leftover(path)
    assert aside is not None
    assert content(aside) == old
    try:
        read_bundle(path)
    except InvalidBundle as error:
        return "aside" if str(aside) in str(error) else "lost"
    return "lost"


def kill_everywhere(path: Path, old: Files, new: Files) -> None:
    for number in count():
        more = killed(path, new, number)
        sys.stdout.write(found(path, old, new) + "\n")
        replace_folder(path, old)  # the next writer mends what the killed one left
        assert found(path, old, new) == "old"
        assert list(path.parent.glob(".*")) == [], "something is left beside the bundle"
        if not more:
            return


def full_disk(path: Path, old: Files, new: Files) -> None:
    """No file may grow beyond some size, at many sizes."""
    largest = max(map(len, new.values()))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, largest, 1 + largest // 40):
        said: str | None = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            replace_folder(path, new)
        except OSError as error:
            said = error.strerror
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert said == "File too large", said
        assert list(path.parent.glob(".*")) == [], "something is left beside the bundle"
        sys.stdout.write(found(path, old, new) + "\n")


def never(first: Path, second: Path) -> bool:
    return False


if __name__ == "__main__":
    mode, path = sys.argv[1], Path(sys.argv[2])
    if mode == "kill-without-exchange":
        durable._exchange = never
    interrupt = full_disk if mode == "full" else kill_everywhere
    interrupt(path, content(path), content(Path(sys.argv[3])))
