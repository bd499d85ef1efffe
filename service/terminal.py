"""How commands print tables: as wide as the terminal, and to whoever has seen enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


def console() -> Console:
    """A file or a pipe has no width of its own: rich would take 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 150)


@contextmanager
def printing() -> Iterator[Console]:
    """For all that a command prints; it ends early, and without an error, where nobody reads on, as `head` does."""
    try:
        yield console()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
