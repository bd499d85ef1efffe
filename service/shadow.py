"""Shadow ensembles: a share of the traffic also runs through another ensemble, and it is counted how often the two agree.

Nobody waits for a shadow. Its images run one at a time, in time that lanes have had to spare for a while (service/engine.py), and a
run is stopped as soon as they have none; it is begun again later. What comes while too much waits is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine import Engine, Images, Lanes, Stop, Stopped
from service.metrics import ShadowMetrics
from service.witnesses import Answered

log = logging.getLogger(__name__)

MOST_WAITING = 256  # images
QUIET_SECONDS = 0.005  # with time to spare: a caller who asks again at once is back before


@dataclass(frozen=True, slots=True)
class _Sampled:
    """One image, copied out of its batch, and what its caller's ensemble said."""

    images: Images  # (1, height, width, channels)
    label: int
    verdict: int


class Shadow:
    """The shadow of one ensemble: a witness of its answers, and a thread that computes. Thread-safe."""

    def __init__(
        self, engine: Engine, beside: Lanes, share: float, metrics: ShadowMetrics, draw: Callable[[], float] = random.random
    ) -> None:
        """`engine` is the shadow's; `beside` are the lanes of the ensemble whose traffic it gets, its own or others."""
        self._engine, self._share, self._metrics, self._draw = engine, share, metrics, draw
        self._lanes = tuple(dict.fromkeys((beside, engine.lanes)))  # none of them may be made to wait
        self._waiting: deque[_Sampled] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._running: Stop | None = None
        self._thread = threading.Thread(target=self._compute_all, name="shadow", daemon=True)
        self._thread.start()

    def saw(self, answered: Answered) -> None:
        if self._ended:
            return
        decision = answered.result.decision
        for row in range(len(answered.images)):
            if self._draw() >= self._share:
                continue
            if len(self._waiting) >= MOST_WAITING:
                self._metrics.dropped("queue_full")
                continue
            alone = answered.images[row : row + 1].copy()
            with self._changed:
                self._waiting.append(_Sampled(alone, int(decision.label[row]), int(decision.verdict[row])))
                self._changed.notify()

    def settle(self) -> None:
        """Return when nothing waits any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._running is None)

    def close(self) -> None:
        """Nothing is computed any more; what waits is dropped."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            if self._running is not None:
                self._running.now()
            self._changed.notify_all()
        for lanes in self._lanes:
            lanes.wake_borrowers()
        self._thread.join()

    def _compute_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting)
                if self._ended:
                    return
            if all(lanes.await_idle(QUIET_SECONDS, lambda: self._ended) for lanes in self._lanes):
                self._compute_one()

    def _compute_one(self) -> None:
        stop = Stop()
        with contextlib.ExitStack() as borrowed:
            for lanes in self._lanes:
                if not lanes.borrow(stop):
                    return
                borrowed.callback(lanes.give_back)
            self._run(stop)

    def _run(self, stop: Stop) -> None:
        with self._changed:
            if self._ended or not self._waiting:
                return
            sampled, self._running = self._waiting.popleft(), stop
        try:
            decision = self._engine.run(sampled.images, stop=stop).decision
            self._metrics.compared(int(decision.label[0]) == sampled.label, int(decision.verdict[0]) == sampled.verdict)
        except Stopped:
            with self._changed:
                if not self._ended:
                    self._waiting.appendleft(sampled)
        except Exception:
            log.exception("shadow: an image that could not be computed")
            self._metrics.dropped("failed")
        finally:
            with self._changed:
                self._running = None
                self._changed.notify_all()
