"""One process at a time for one piece of work."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.refused import TrainingRefused


class AlreadyRunning(TrainingRefused):
    """Another process writes the same files."""


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` inside; it goes with the process, however that ends. Raises AlreadyRunning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyRunning(f"another process holds {path}, and does this work already") from None
        yield
