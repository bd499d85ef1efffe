"""What one caller may take from the others: images in a second, and calls at once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from service.config import QuotaConfig
from service.errors import TooFast

REMEMBERED = 4096  # callers; of more, who was here longest ago begins anew


class Quota:
    """One caller's, shared by all of its calls."""

    def __init__(self, limits: QuotaConfig, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._name, self._clock = name, clock
        self._lock = threading.Lock()
        self._calls = 0
        self._tokens, self._filled = float(limits.burst_images), clock()

    def begin_call(self) -> None:
        """Raises TooFast where the caller has too many calls already."""
        most = self.limits.concurrent_calls
        with self._lock:
            if most is not None and self._calls >= most:
                raise TooFast(f"caller `{self._name}` has {self._calls} calls open already, which is its limit", 0.1)
            self._calls += 1

    def end_call(self) -> None:
        with self._lock:
            self._calls -= 1

    def spend(self, images: int) -> None:
        """Take tokens for images, or raise TooFast.

        A token bucket that may go into debt: a request larger than the bucket is answered, and waited for afterwards.
        """
        rate = self.limits.images_per_second
        if rate is None:
            return
        with self._lock:
            now = self._clock()
            self._tokens = min(self.limits.burst_images, self._tokens + max(0.0, now - self._filled) * rate)
            self._filled = now
            if self._tokens < 1:
                wait = (1 - self._tokens) / rate
                raise TooFast(f"caller `{self._name}` asked for more than its {rate:g} images a second", wait)
            self._tokens -= images


class Quotas:
    """Every caller's quota, by name; a caller whose limits were changed begins anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quotas: OrderedDict[str, Quota] = OrderedDict()

    def of(self, name: str, limits: QuotaConfig) -> Quota:
        with self._lock:
            found = self._quotas.get(name)
            if found is None or (found.limits is not limits and found.limits != limits):
                found = self._quotas[name] = Quota(limits, name)
            self._quotas.move_to_end(name)
            if len(self._quotas) > REMEMBERED:
                self._quotas.popitem(last=False)
            return found
