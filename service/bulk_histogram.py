"""A Prometheus histogram for the path of every call: an observation is put aside, and counted with many others later.

prometheus_client's takes two locks and a walk through the bounds for each, some microseconds; a call makes six.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

COUNT_AT = 1024  # observations put aside before they are counted without a scrape


class Observations:
    """Those of one combination of labels. Thread-safe."""

    __slots__ = ("_aside", "_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.asarray(bounds, np.float64)
        self._counts = np.zeros(len(bounds) + 1, np.int64)  # the last one is beyond all bounds
        self._sum = 0.0
        self._aside: deque[float] = deque()
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        aside = self._aside
        aside.append(value)
        if len(aside) >= COUNT_AT:
            self.counted()

    def counted(self) -> tuple[list[int], float]:
        """How many there were up to each bound and beyond all, and their sum."""
        with self._lock:
            values = [self._aside.popleft() for _ in range(len(self._aside))]  # others may be appending meanwhile
            if values:
                places = np.searchsorted(self._bounds, values)  # value <= bound, as Prometheus's `le` has it
                self._counts += np.bincount(places, minlength=len(self._counts))
                self._sum += sum(values)
            return self._counts.cumsum().tolist(), self._sum


class BulkHistogram(Collector):
    """Registers itself; `labels` hands out what observes."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._about = name, documentation
        self._labels, self._buckets = tuple(labels), tuple(buckets)
        self._bounds = (*(str(float(bound)) for bound in buckets), "+Inf")
        self._children: dict[tuple[str, ...], Observations] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> Observations:
        """The same ones for the same values."""
        with self._lock:
            found = self._children.get(values)
            if found is None:
                found = Observations(self._buckets)
                self._children = self._children | {values: found}  # a scrape may be walking through the old one
            return found

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for values, observations in self._children.items():
            counts, total = observations.counted()
            family.add_metric(values, [(bound, float(n)) for bound, n in zip(self._bounds, counts, strict=True)], total)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(*self._about, labels=self._labels)
