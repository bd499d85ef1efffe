"""The metrics of all workers on one port: each series with the label `worker`, as each counts for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.registry import Collector

WORKER = "worker"

Scraped = Mapping[int, Iterable[Metric]]  # by a worker's number


class GatheredMetrics:
    """A registry of its own. A worker that ends takes its counts with it: to Prometheus, the next one's are a counter reset."""

    def __init__(self, scrape: Callable[[], Scraped], wanted: int, serving: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._ends = Counter("phalanx_worker_ends", "Workers that ended without being told to.", (WORKER,), registry=self.registry)
        Gauge("phalanx_workers_wanted", "Workers that there should be.", registry=self.registry).set(wanted)
        Gauge("phalanx_workers", "Workers that serve.", registry=self.registry).set_function(serving)
        self.registry.register(_Gathered(scrape))

    def watch(self, worker: int) -> None:
        """A series from the start on, as rate() needs it."""
        self._ends.labels(str(worker))

    def ended(self, worker: int) -> None:
        self._ends.labels(str(worker)).inc()


class _Gathered(Collector):
    def __init__(self, scrape: Callable[[], Scraped]) -> None:
        self._scrape = scrape

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, metrics in sorted(self._scrape().items()):
            for metric in metrics:
                family = families.setdefault(metric.name, copy(metric))
                if family.samples is metric.samples:
                    family.samples = []
                family.samples += [sample._replace(labels={**sample.labels, WORKER: str(worker)}) for sample in metric.samples]
        yield from families.values()
