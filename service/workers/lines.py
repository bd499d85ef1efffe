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
        self._asked, self._answered = 0, 0  # the last question's number, and that of the last answer

    def ask(self, question: object, seconds: float) -> Any:
        """Raises NoAnswer after so many seconds, or where the other side is gone. Nothing is asked before the last question is
        answered: who does not answer shall not have them pile up.
        """
        end = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise NoAnswer(f"no answer to another question within {seconds:g} s")
        try:
            self._await_answer(end, seconds)
            self._asked += 1
            self._connection.send((self._asked, question))
            return self._await_answer(end, seconds)
        except (EOFError, OSError):
            raise NoAnswer("it has ended") from None
        finally:
            self._lock.release()

    def _await_answer(self, end: float, seconds: float) -> Any:
        """The answer to what was asked last, if anything is open."""
        answer = None
        while self._answered < self._asked:
            if not self._connection.poll(max(0.0, end - time.monotonic())):
                raise NoAnswer(f"no answer within {seconds:g} s")
            self._answered, answer = self._connection.recv()
        return answer

    def close(self) -> None:
        self._connection.close()


def answer(connection: Connection[Any, Any], handle: Callable[[Any], object]) -> None:
    """Answer every question until the other side is gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, question = connection.recv()
            connection.send((number, handle(question)))
