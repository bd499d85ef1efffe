"""What a scrape reads after known answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from models.ensemble import Decision, Reason, Verdict
from service.metrics import FOLD_AT, EnsembleFacts, EnsembleMetrics, Metrics


def decision(
    labels: list[int],
    votes: list[list[int]],
    p_values: list[list[float]],
    verdicts: list[Verdict],
    reasons: list[Reason],
    p_value: list[float],
) -> Decision:
    """Answers over three classes; votes (N, M) name the class that each voter chooses."""
    n = len(labels)
    return Decision(
        probabilities=np.eye(3, dtype=np.float32)[labels],
        label=np.array(labels, np.int64),
        confidence=np.ones(n, np.float32),
        votes=np.eye(3, dtype=np.float32)[np.array(votes)],
        scores=np.zeros((n, len(p_values[0])), np.float32),
        p_values=np.array(p_values, np.float32).reshape(n, -1),
        statistic=np.zeros(n, np.float32),
        p_value=np.array(p_value, np.float32),
        verdict=np.array(verdicts, np.int64),
        reason=np.array(reasons, np.int64),
        finite=np.ones(n, np.bool_),
    )


def two_answers() -> Decision:
    return decision(
        labels=[0, 1],
        votes=[[0, 2], [1, 1]],
        p_values=[[0.05, 0.5], [0.004, 1.0]],
        verdicts=[Verdict.CLEAN, Verdict.REJECTED],
        reasons=[Reason.NONE, Reason.LOW_P_VALUE],
        p_value=[0.2, 0.0025],
    )


FACTS = EnsembleFacts("CPUExecutionProvider", True, 0.05, 0.01, 1024)


def full(metrics: Metrics, facts: EnsembleFacts = FACTS, waiting: Callable[[], float] = lambda: 0) -> EnsembleMetrics:
    own = metrics.ensemble("full", ["metric", "edge"], ["distance", "disagreement"])
    metrics.offer("full", own, facts, waiting)
    return own


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_members_dissent_counts_the_images_on_which_it_votes_for_another_class() -> None:
    metrics = Metrics()
    full(metrics).run(two_answers())
    assert sample(metrics, "phalanx_dissent_total", ensemble="full", member="edge") == 1
    assert sample(metrics, "phalanx_dissent_total", ensemble="full", member="metric") == 0


def test_verdicts_are_counted_with_their_reason_and_are_there_before_they_happen() -> None:
    metrics = Metrics()
    ensemble = full(metrics)

    def count(verdict: str, reason: str) -> float | None:
        return sample(metrics, "phalanx_verdicts_total", ensemble="full", verdict=verdict, reason=reason)

    assert count("rejected", "low_p_value") == 0
    ensemble.run(two_answers())
    assert (count("clean", "none"), count("rejected", "low_p_value"), count("suspect", "low_p_value")) == (1, 1, 0)
    assert count("rejected", "non_finite") is None


@pytest.mark.parametrize(
    ("detector", "bound", "expected"),
    [
        pytest.param("distance", "0.0025", 0, id="nothing below the smallest"),
        pytest.param("distance", "0.005", 1, id="the bucket of the smaller one"),
        pytest.param("distance", "0.05", 2, id="a value on a bound belongs to it"),
        pytest.param("disagreement", "0.4", 0, id="each detector has its own"),
        pytest.param("disagreement", "1.0", 2, id="one is the largest p-value"),
        pytest.param("combined", "0.0025", 1, id="the combined one stands beside them"),
        pytest.param("combined", "+Inf", 2, id="all are counted in the last"),
    ],
)
def test_p_values_fall_into_their_buckets(detector: str, bound: str, expected: int) -> None:
    metrics = Metrics()
    full(metrics).run(two_answers())
    assert sample(metrics, "phalanx_p_value_bucket", ensemble="full", detector=detector, le=bound) == expected


def test_counting_in_bulk_equals_counting_one_by_one() -> None:
    rng = np.random.default_rng(0)
    n = 2 * FOLD_AT + 7  # folded twice by itself, and once by the scrape
    p = rng.uniform(size=(n, 2)).astype(np.float32)
    labels, votes = rng.integers(3, size=n), rng.integers(3, size=(n, 2))
    metrics = Metrics()
    ensemble = full(metrics)
    for i in range(n):
        ensemble.run(decision([labels[i]], [votes[i].tolist()], [p[i].tolist()], [Verdict.CLEAN], [Reason.NONE], [float(p[i, 0])]))
    assert sample(metrics, "phalanx_batch_images_count", ensemble="full") == n
    dissent = sample(metrics, "phalanx_dissent_total", ensemble="full", member="edge")
    assert dissent == (votes[:, 1] != labels).sum()
    below = sample(metrics, "phalanx_p_value_bucket", ensemble="full", detector="disagreement", le="0.3")
    assert below == (p[:, 1] <= np.float32(0.3)).sum()
    total = sample(metrics, "phalanx_p_value_sum", ensemble="full", detector="disagreement")
    assert total == pytest.approx(p[:, 1].sum(dtype=np.float64))


def test_nothing_is_lost_between_threads_that_answer_and_scrapes() -> None:
    metrics = Metrics()
    ensemble = full(metrics)

    def answer() -> None:
        for _ in range(300):
            ensemble.run(two_answers())

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        generate_latest(metrics.registry)
    for thread in threads:
        thread.join()
    assert sample(metrics, "phalanx_dissent_total", ensemble="full", member="edge") == 4 * 300


def test_a_call_is_in_flight_until_it_ends_and_its_error_is_counted_by_code() -> None:
    metrics = Metrics()
    call = metrics.call("Classify", "full")
    labels = {"ensemble": "full", "method": "Classify"}
    first, second = call.begin(), call.begin()
    assert sample(metrics, "phalanx_in_flight_requests", **labels) == 2
    call.end(first)
    call.end(second, "CANCELLED")
    assert sample(metrics, "phalanx_in_flight_requests", **labels) == 0
    assert sample(metrics, "phalanx_request_seconds_count", **labels) == 2
    assert sample(metrics, "phalanx_errors_total", **labels, code="CANCELLED") == 1
    assert sample(metrics, "phalanx_errors_total", **labels, code="OK") is None


@pytest.mark.parametrize("stage", ["decode", "queue", "compute", "encode"])
def test_every_stage_has_a_histogram(stage: str) -> None:
    metrics = Metrics()
    getattr(full(metrics), stage)(0.003)
    labels = {"ensemble": "full", "stage": stage}
    assert sample(metrics, "phalanx_stage_seconds_sum", **labels) == pytest.approx(0.003)
    assert sample(metrics, "phalanx_stage_seconds_bucket", **labels, le="0.0025") == 0
    assert sample(metrics, "phalanx_stage_seconds_bucket", **labels, le="0.005") == 1


def test_the_queue_is_asked_for_its_depth_by_the_scrape() -> None:
    metrics = Metrics()
    waiting = [3]
    full(metrics, waiting=lambda: waiting[0])
    assert sample(metrics, "phalanx_queue_images", ensemble="full") == 3
    waiting[0] = 0
    assert sample(metrics, "phalanx_queue_images", ensemble="full") == 0


def test_bundle_and_provider_are_told_and_a_new_one_takes_the_place_of_the_old() -> None:
    metrics = Metrics()
    for version, provider in (("1", "CUDAExecutionProvider"), ("2", "CPUExecutionProvider")):
        metrics.offer_bundle("tiny", version)
        on_cpu = provider == "CPUExecutionProvider"
        full(metrics, EnsembleFacts(provider, on_cpu, 0.05, 0.01, 1024, cuda_graphs=not on_cpu))
        assert sample(metrics, "phalanx_cuda_graphs", ensemble="full") == (not on_cpu)
    assert sample(metrics, "phalanx_bundle_info", bundle="tiny", version="2") == 1
    assert sample(metrics, "phalanx_bundle_info", bundle="tiny", version="1") is None
    assert sample(metrics, "phalanx_provider_info", ensemble="full", provider="CPUExecutionProvider") == 1
    assert sample(metrics, "phalanx_provider_info", ensemble="full", provider="CUDAExecutionProvider") is None
    assert sample(metrics, "phalanx_provider_fallback", ensemble="full") == 1
    assert sample(metrics, "phalanx_calibrated_ratio", ensemble="full", level="review") == 0.05
    assert sample(metrics, "phalanx_queue_limit_images", ensemble="full") == 1024
    metrics.forget("full")
    for gone in ("phalanx_provider_fallback", "phalanx_cuda_graphs", "phalanx_queue_limit_images", "phalanx_queue_images"):
        assert sample(metrics, gone, ensemble="full") is None


def test_images_answered_with_an_error_are_counted_by_code() -> None:
    metrics = Metrics()
    metrics.image_errors("full", "INVALID_ARGUMENT", 3)
    assert sample(metrics, "phalanx_image_errors_total", ensemble="full", code="INVALID_ARGUMENT") == 3


def test_every_series_of_an_ensemble_carries_its_name_and_no_summary_is_among_them() -> None:
    metrics = Metrics()
    full(metrics).run(two_answers())
    votes_only = metrics.ensemble("votes-only", ["metric"], [])
    metrics.offer("votes-only", votes_only, FACTS, lambda: 0)
    votes_only.run(decision([0], [[0]], [[]], [Verdict.UNSCREENED], [Reason.NONE], [1.0]))
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    assert not [family.name for family in families if family.type == "summary"]
    of_the_server = (
        "phalanx_bundle_info",
        "phalanx_reloads",
        "phalanx_reloads_created",
        "phalanx_tls_certificate_expiry_timestamp_seconds",
    )
    series = [sample for family in families for sample in family.samples if family.name not in of_the_server]
    assert {sample.labels.get("ensemble") for sample in series} == {"full", "votes-only"}
    assert not [s for s in series if s.labels["ensemble"] == "votes-only" and s.name.startswith("phalanx_p_value")]


def test_two_servers_in_one_process_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    full(first).run(two_answers())
    full(second)
    assert sample(second, "phalanx_dissent_total", ensemble="full", member="edge") == 0
