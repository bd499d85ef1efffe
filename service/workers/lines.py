"""Questions and answers between two processes of ours, over a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class NoAnswer(Exception):
    """The other side ended, or takes too long."""


class Line:
    """Asks, one question at a time. Thread-safe."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._number = 0

    def ask(self, question: object, seconds: float) -> Any:
        """Raises NoAnswer after so many seconds, or where the other side is gone."""
        with self._lock:
            self._number += 1
            end = time.monotonic() + seconds
            try:
                self._connection.send((self._number, question))
                while self._connection.poll(max(0.0, end - time.monotonic())):
                    number, answer = self._connection.recv()
                    if number == self._number:  # else to a question that was given up
                        return answer
            except (EOFError, OSError):
                raise NoAnswer("it has ended") from None
        raise NoAnswer(f"no answer within {seconds:g} s")

    def close(self) -> None:
        self._connection.close()


def answer(connection: Connection[Any, Any], handle: Callable[[Any], object]) -> None:
    """Answer every question until the other side is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer_one(connection, handle)


def answer_one(connection: Connection[Any, Any], handle: Callable[[Any], object]) -> None:
    """Wait for a question and answer it; raises EOFError or OSError where the other side is gone."""
    number, question = connection.recv()
    connection.send((number, handle(question)))
