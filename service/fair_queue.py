"""Requests of several callers, taken in turn: whoever has sent a thousand waits for himself, and not the others for him."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from service.batch import Request


class FairQueue:
    """First in, first out for each caller, and round robin among callers. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Request]] = {}  # nobody is in it who has nothing waiting; in the order of turns

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        for requests in self._waiting.values():
            yield from requests

    @property
    def callers(self) -> int:
        """How many have something waiting."""
        return len(self._waiting)

    def append(self, request: Request) -> None:
        """Behind the caller's other requests; a caller who had none comes after all who have."""
        self._waiting.setdefault(request.caller, deque()).append(request)

    @contextmanager
    def turn(self) -> Iterator[deque[Request]]:
        """What the caller has waiting whose turn it is, to take from and to append to; who has some left is last then."""
        caller = next(iter(self._waiting))
        requests = self._waiting.pop(caller)
        yield requests
        if requests:
            self._waiting[caller] = requests

    def clear(self) -> None:
        self._waiting.clear()


class Holdings:
    """How many images each caller has waiting, of at most `limit` in all. Not thread-safe."""

    GREED = 8

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()
        self.total = 0

    @property
    def full(self) -> bool:
        """Whether nobody can have room."""
        return self.total >= self.limit

    def has_room(self, caller: str, images: int) -> bool:
        """Whether the images may enter, so that all stays within the limit and something is left for who comes next.

        A known caller may hold at most GREED times what is left free (dynamic thresholds, Choudhury & Hahne 1998): one
        alone 8/9 of the queue, two together 16/17. Callers who cannot be told apart (the empty name) share all of it.
        A request that is larger than the whole queue may enter an empty one: told to come back later, it would for ever.
        """
        free = self.limit - self.total
        if not self.total:
            return True
        if images > free:
            return False
        held = self._held[caller]
        return not caller or not held or held + images <= self.GREED * (free - images)

    def add(self, caller: str, images: int) -> None:
        self._held[caller] += images
        self.total += images

    def remove(self, caller: str, images: int) -> None:
        self.total -= images
        self._held[caller] -= images
        if not self._held[caller]:
            del self._held[caller]

    def clear(self) -> None:
        self._held.clear()
        self.total = 0
