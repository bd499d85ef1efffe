"""What may happen at every call, and is worth a line in the log from time to time."""

from __future__ import annotations

import math
import threading
import time


class Seldom:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._untold, self._told_at = 0, -math.inf

    def due(self, count: int, seconds: float) -> int:
        """Count in so many; how many have come since they were last told, 0 where that is less than `seconds` ago."""
        with self._lock:
            self._untold += count
            now = time.monotonic()
            if now - self._told_at < seconds:
                return 0
            due, self._untold, self._told_at = self._untold, 0, now
            return due
