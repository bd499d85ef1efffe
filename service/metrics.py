"""What an operator watches: every time series of the service, under its ensemble's name.

Counts use children bound to their labels once. Times, and what an answer holds (verdicts, dissent, p-values), are only
put aside and counted in bulk, when a scrape asks or enough has gathered: one `bincount` for some hundred images instead of a
dozen increments for each.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from models.ensemble import Decision, Reason, Verdict
from service.bulk_histogram import BulkHistogram, Observations

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Fine where verdicts are made (by default at 0.01 and 0.05); clean traffic fills each in proportion to its width.
P_VALUES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COMBINED = "combined"
FOLD_AT = 256  # images put aside before they are counted without a scrape


class Closed(StrEnum):
    """Why a batch took in no more."""

    FULL = "full"
    READY = "ready"  # everybody who was likely to come had come
    DELAY = "delay"  # somebody had not, and was waited for as long as the configuration allows
    DEADLINE = "deadline"  # to wait longer would have missed one


@dataclass(frozen=True, slots=True)
class EnsembleFacts:
    """What an alert compares with."""

    provider: str  # that the session really has
    fallback: bool  # whether another one was asked for
    review_rate: float
    reject_rate: float
    queue_limit: int
    cuda_graphs: bool = False  # whether a run is one launch, on a GPU


class Metrics:
    """All time series of one server, in a registry of their own. `ensemble` and `call` hand out their bound parts."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        by_call = ("ensemble", "method")
        self._request = BulkHistogram(
            "phalanx_request_seconds",
            "Time from a request's arrival in its handler to its answer.",
            by_call,
            SECONDS,
            self.registry,
        )
        self._in_flight = Gauge("phalanx_in_flight_requests", "Requests being answered.", by_call, registry=self.registry)
        self._errors = Counter(
            "phalanx_errors", "Requests not answered OK, by gRPC code.", (*by_call, "code"), registry=self.registry
        )
        self._image_errors = Counter(
            "phalanx_image_errors",
            "Images answered with an error inside an answered request, by gRPC code.",
            ("ensemble", "code"),
            registry=self.registry,
        )
        self._stage = BulkHistogram(
            "phalanx_stage_seconds",
            "Time of a request's stages: decode, queue, compute, encode.",
            ("ensemble", "stage"),
            SECONDS,
            self.registry,
        )
        self._batch = BulkHistogram("phalanx_batch_images", "Images in one run.", ("ensemble",), IMAGES, self.registry)
        self._closed = Counter(
            "phalanx_batches",
            "Batches taken from the queue, by why they took in no more.",
            ("ensemble", "reason"),
            registry=self.registry,
        )
        self._depth = Gauge("phalanx_queue_images", "Images waiting for a run.", ("ensemble",), registry=self.registry)
        self._bundle = Gauge("phalanx_bundle_info", "Always 1; the bundle served.", ("bundle", "version"), registry=self.registry)
        self._provider = Gauge(
            "phalanx_provider_info",
            "Always 1; the execution provider that the session really has.",
            ("ensemble", "provider"),
            registry=self.registry,
        )
        self._reloads = Counter(
            "phalanx_reloads",
            "Changes of what is served, by outcome: ok, or failed and all as before.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in ("ok", "failed"):
            self._reloads.labels(outcome)
        self._expiry = Gauge(
            "phalanx_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use expires; 0 without one.",
            registry=self.registry,
        )
        self._fallback = Gauge(
            "phalanx_provider_fallback",
            "1 where the session has another provider than was asked for.",
            ("ensemble",),
            registry=self.registry,
        )
        self._cuda_graphs = Gauge(
            "phalanx_cuda_graphs",
            "1 where a run on a GPU is one launch, 0 where graphs are off or were refused, and on the CPU.",
            ("ensemble",),
            registry=self.registry,
        )
        self._limit = Gauge("phalanx_queue_limit_images", "Images that may wait for a run.", ("ensemble",), registry=self.registry)
        self._calibrated = Gauge(
            "phalanx_calibrated_ratio",
            "Share of clean images that calibration promises to set aside: at least suspect (review), or rejected (reject).",
            ("ensemble", "level"),
            registry=self.registry,
        )
        self._compared = Counter(
            "phalanx_shadow_images",
            "Images that ran through a shadow ensemble, too, by whether it gave the same class and the same verdict.",
            ("ensemble", "shadow", "label", "verdict"),
            registry=self.registry,
        )
        self._unseen = Counter(
            "phalanx_shadow_dropped_images",
            "Images that were meant for a shadow ensemble and not compared, by why.",
            ("ensemble", "shadow", "reason"),
            registry=self.registry,
        )
        self._providers: dict[str, str] = {}
        self._answers = _Answers()
        self.registry.register(self._answers)

    def ensemble(self, name: str, voters: Sequence[str], detectors: Sequence[str]) -> EnsembleMetrics:
        """The part of the ensemble `name`; voters and detectors in the order of the decision's columns.

        Of a name that is served already, what is told stays as it is until `offer`.
        """
        tally = self._answers.find(name, voters, detectors)
        stages = {stage: self._stage.labels(name, stage) for stage in ("decode", "queue", "compute", "encode")}
        closed = {reason: self._closed.labels(name, reason) for reason in Closed}
        return EnsembleMetrics(tally, stages, self._batch.labels(name), closed)

    def forget(self, name: str) -> None:
        """An ensemble that is served no more: what it was is no more told, what it did stays counted."""
        with contextlib.suppress(KeyError):
            for gauge in (self._depth, self._fallback, self._cuda_graphs, self._limit):
                gauge.remove(name)
            self._provider.remove(name, self._providers[name])
            for level in ("review", "reject"):
                self._calibrated.remove(name, level)
        self._providers = {other: provider for other, provider in self._providers.items() if other != name}

    def reloads(self, outcome: str) -> None:
        """A reload, or a change of the ensembles, went well (`ok`) or changed nothing (`failed`)."""
        self._reloads.labels(outcome).inc()

    def certificate_expires(self, seconds: float) -> None:
        """In seconds since the epoch."""
        self._expiry.set(seconds)

    def shadow(self, ensemble: str, shadow: str) -> ShadowMetrics:
        """The part of one ensemble and of what runs in its shadow."""
        return ShadowMetrics(
            {
                (label, verdict): self._compared.labels(ensemble, shadow, _agreement(label), _agreement(verdict))
                for label in (True, False)
                for verdict in (True, False)
            },
            {reason: self._unseen.labels(ensemble, shadow, reason) for reason in ("queue_full", "failed")},
        )

    def quarantine(self) -> QuarantineMetrics:
        """Asked for once, where there is a quarantine: without one there is nothing to watch."""
        return QuarantineMetrics(self.registry)

    def tracing(self) -> TracingMetrics:
        """Asked for once, where there are traces."""
        return TracingMetrics(self.registry)

    def call(self, method: str, ensemble: str) -> CallMetrics:
        """The part of one method on one ensemble; `ensemble` is a served name or "", never what a caller wrote."""
        return CallMetrics(
            self._request.labels(ensemble, method),
            self._in_flight.labels(ensemble, method),
            lambda code: self._errors.labels(ensemble, method, code).inc(),
        )

    def image_errors(self, ensemble: str, code: str, images: int = 1) -> None:
        self._image_errors.labels(ensemble, code).inc(images)

    def offer_bundle(self, name: str, version: str) -> None:
        """A new bundle takes the old one's place."""
        self._bundle.clear()
        self._bundle.labels(name, version).set(1)

    def offer(self, name: str, own: EnsembleMetrics, facts: EnsembleFacts, waiting: Callable[[], float]) -> None:
        """An ensemble is served now: `own` takes the place of what was told of that name before. `waiting`, images, is asked
        by a scrape, so that a request pays nothing for it.
        """
        self._answers.put(name, own.tally)
        self._depth.labels(name).set_function(waiting)
        previous = self._providers.get(name)
        if previous is not None and previous != facts.provider:
            self._provider.remove(name, previous)
        self._providers = self._providers | {name: facts.provider}
        self._provider.labels(name, facts.provider).set(1)
        self._fallback.labels(name).set(facts.fallback)
        self._cuda_graphs.labels(name).set(facts.cuda_graphs)
        self._limit.labels(name).set(facts.queue_limit)
        for level, ratio in (("review", facts.review_rate), ("reject", facts.reject_rate)):
            self._calibrated.labels(name, level).set(ratio)


class CallMetrics:
    """Requests of one method on one ensemble."""

    __slots__ = ("_error", "_in_flight", "_seconds")

    def __init__(self, seconds: Observations, in_flight: Gauge, error: Callable[[str], None]) -> None:
        self._seconds, self._in_flight, self._error = seconds, in_flight, error

    def begin(self) -> float:
        """Count a request in; returns the moment to hand to `end`."""
        self._in_flight.inc()
        return time.perf_counter()

    def end(self, began: float, code: str = "OK") -> None:
        """Count a request out, whatever became of it: answered, refused, or given up by its caller."""
        self._in_flight.dec()
        self._seconds.observe(time.perf_counter() - began)
        if code != "OK":
            self._error(code)


class EnsembleMetrics:
    """What one ensemble's codec and batcher report."""

    __slots__ = ("_batch", "_closed", "compute", "decode", "encode", "queue", "tally")

    def __init__(self, tally: Tally, stages: dict[str, Observations], batch: Observations, closed: dict[Closed, Counter]) -> None:
        self.tally, self._batch, self._closed = tally, batch, closed
        self.decode: Callable[[float], None] = stages["decode"].observe
        self.queue: Callable[[float], None] = stages["queue"].observe
        self.compute: Callable[[float], None] = stages["compute"].observe
        self.encode: Callable[[float], None] = stages["encode"].observe

    def closed(self, reason: Closed) -> None:
        """A batch was taken from the queue."""
        self._closed[reason].inc()

    def run(self, decision: Decision) -> None:
        """One run's answers."""
        self._batch.observe(len(decision.label))
        self.tally.put(decision)


class ShadowMetrics:
    """How often a shadow says what its ensemble said."""

    __slots__ = ("_compared", "_dropped")

    def __init__(self, compared: Mapping[tuple[bool, bool], Counter], dropped: Mapping[str, Counter]) -> None:
        self._compared, self._dropped = compared, dropped

    def compared(self, label: bool, verdict: bool) -> None:
        """Whether it was the same."""
        self._compared[label, verdict].inc()

    def dropped(self, reason: str) -> None:
        self._dropped[reason].inc()


def _agreement(same: bool) -> str:
    return "same" if same else "other"


class QuarantineMetrics:
    """What becomes of suspect and rejected images where they are kept."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._kept = Counter("phalanx_quarantine_kept_images", "Images put into quarantine.", ("verdict",), registry=registry)
        self._evicted = Counter("phalanx_quarantine_evicted_images", "Images that made room for later ones.", registry=registry)
        self._dropped = Counter(
            "phalanx_quarantine_dropped_images", "Images that were not kept, by why.", ("reason",), registry=registry
        )
        self._bytes = Gauge(
            "phalanx_quarantine_bytes",
            "What lies in quarantine, whoever put it there: each worker says the same.",
            registry=registry,
        )
        for verdict in (Verdict.SUSPECT, Verdict.REJECTED):
            self._kept.labels(verdict.name.lower())
        for reason in ("queue_full", "disk"):
            self._dropped.labels(reason)

    def kept(self, verdict: int) -> None:
        self._kept.labels(Verdict(verdict).name.lower()).inc()

    def evicted(self, images: int) -> None:
        self._evicted.inc(images)

    def dropped(self, reason: str, images: int) -> None:
        self._dropped.labels(reason).inc(images)

    def holds(self, size: int) -> None:
        self._bytes.set(size)


class TracingMetrics:
    """What becomes of spans on their way to a collector."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._spans = Counter("phalanx_spans", "Spans by whether a collector took them.", ("outcome",), registry=registry)
        for outcome in ("exported", "lost"):
            self._spans.labels(outcome)

    def exported(self, spans: int) -> None:
        self._spans.labels("exported").inc(spans)

    def lost(self, spans: int) -> None:
        self._spans.labels("lost").inc(spans)


class Tally:
    """Counts of one ensemble's answers. K classes, M voters, D detectors; the combined p-value is detector D + 1."""

    def __init__(self, voters: Sequence[str], detectors: Sequence[str]) -> None:
        self.voters, self.detectors = tuple(voters), (*detectors, COMBINED) if detectors else ()
        self.dissent = np.zeros(len(self.voters), np.int64)
        self.verdicts = np.zeros((len(Verdict), len(Reason)), np.int64)
        self.p_counts = np.zeros((len(self.detectors), len(P_VALUES) + 1), np.int64)
        self.p_sums = np.zeros(len(self.detectors))
        self.lock = threading.Lock()
        self._aside: list[Decision] = []
        self._images = 0

    def put(self, decision: Decision) -> None:
        with self.lock:
            self._aside.append(decision)
            self._images += len(decision.label)
            if self._images >= FOLD_AT:
                self.fold()

    def fold(self) -> None:
        """Count what was put aside; the caller holds the lock."""
        aside, self._aside, self._images = self._aside, [], 0
        if not aside:
            return
        label = np.concatenate([d.label for d in aside])  # (n,)
        chosen = np.concatenate([d.votes for d in aside]).argmax(axis=2)  # (n, M)
        self.dissent += (chosen != label[:, None]).sum(axis=0)
        verdict = np.concatenate([d.verdict for d in aside])
        reason = np.concatenate([d.reason for d in aside])
        self.verdicts += _count(verdict * len(Reason) + reason, self.verdicts.shape)
        if self.detectors:
            combined = np.concatenate([d.p_value for d in aside])[:, None]
            p = np.concatenate([np.concatenate([d.p_values for d in aside]), combined], axis=1)  # (n, D + 1)
            bucket = np.searchsorted(np.asarray(P_VALUES, np.float32), p)  # p <= bound, as Prometheus's `le` has it
            rows = np.arange(p.shape[1]) * self.p_counts.shape[1]
            self.p_counts += _count(rows + bucket, self.p_counts.shape)
            self.p_sums += p.sum(axis=0, dtype=np.float64)


def _usual(verdict: Verdict) -> Reason:
    return Reason.LOW_P_VALUE if verdict in (Verdict.SUSPECT, Verdict.REJECTED) else Reason.NONE


def _count(cells: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    return np.bincount(cells.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


class _Answers(Collector):
    """Verdicts, dissent and p-values of every ensemble, written out when a scrape asks."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}

    def find(self, name: str, voters: Sequence[str], detectors: Sequence[str]) -> Tally:
        """The one that goes by this name, or a new one if it has other members: to Prometheus, a counter reset."""
        tally, before = Tally(voters, detectors), self._tallies.get(name)
        same = before is not None and (before.voters, before.detectors) == (tally.voters, tally.detectors)
        return before if before is not None and same else tally

    def put(self, name: str, tally: Tally) -> None:
        self._tallies = self._tallies | {name: tally}

    def collect(self) -> Iterator[Metric]:
        images = CounterMetricFamily(
            "phalanx_verdicts", "Images answered, by verdict and reason.", labels=("ensemble", "verdict", "reason")
        )
        dissent = CounterMetricFamily(
            "phalanx_dissent", "Images on which a member's vote differs from the answer.", labels=("ensemble", "member")
        )
        p_values = HistogramMetricFamily(
            "phalanx_p_value", "p-values of each detector and combined.", labels=("ensemble", "detector")
        )
        for name, tally in self._tallies.items():
            with tally.lock:
                tally.fold()
                for verdict in Verdict:
                    for reason in Reason:
                        count = int(tally.verdicts[verdict, reason])
                        if count or reason is _usual(verdict):  # a series from the start on, as rate() needs it
                            images.add_metric((name, verdict.name.lower(), reason.name.lower()), count)
                for member, count in zip(tally.voters, tally.dissent.tolist(), strict=True):
                    dissent.add_metric((name, member), count)
                for detector, counts, total in zip(tally.detectors, tally.p_counts, tally.p_sums.tolist(), strict=True):
                    cumulative = zip((*map(str, P_VALUES), "+Inf"), counts.cumsum().tolist(), strict=True)
                    p_values.add_metric((name, detector), [(bound, float(n)) for bound, n in cumulative], total)
        yield from (images, dissent, p_values)
