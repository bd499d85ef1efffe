"""Ends calls that keep a thread waiting for their caller: gRPC sends and receives a message without a limit of time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import grpc

LOOK_SECONDS = 0.5  # how often it looks: nothing is ended sooner than it may be, nor much later


class Watchdog:
    """One per server, with a thread of its own. To be watched costs an entry in a dictionary, and no timer."""

    def __init__(self) -> None:
        self._until: dict[grpc.ServicerContext, float] = {}  # on the monotonic clock
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def watched(self) -> int:
        """How many calls wait for their caller."""
        return len(self._until)

    @contextmanager
    def within(self, seconds: float, context: grpc.ServicerContext) -> Iterator[None]:
        """The call is cancelled unless the block ends in time."""
        self._until[context] = monotonic() + seconds
        try:
            yield
        finally:
            del self._until[context]

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            now = monotonic()
            for context, until in self._until.copy().items():
                if now >= until:
                    context.cancel()
