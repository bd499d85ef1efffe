"""Beside prometheus_client's own histogram, and under threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.bulk_histogram import COUNT_AT, BulkHistogram

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def told(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_it_tells_what_prometheus_clients_own_tells() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bulk = BulkHistogram("wait_seconds", "Waiting.", ("who",), BOUNDS, ours)
    usual = Histogram("wait_seconds", "Waiting.", ("who",), buckets=BOUNDS, registry=theirs)
    values = [*BOUNDS, 0.0, 5.0, *np.random.default_rng(0).exponential(0.1, COUNT_AT)]
    for who in ("anna", "ben"):
        mine, its = bulk.labels(who), usual.labels(who)
        for value in values:
            mine.observe(value)
            its.observe(value)
    sums = [float(line.rsplit(" ", 1)[1]) for lines in (told(ours), told(theirs)) for line in lines if "_sum" in line]
    assert sums == pytest.approx([sums[0]] * 4)
    for _ in range(2):  # a scrape takes nothing away
        assert [line for line in told(ours) if "_sum" not in line] == [line for line in told(theirs) if "_sum" not in line]


def test_what_nobody_scrapes_does_not_gather() -> None:
    observations = BulkHistogram("images", "Images.", (), BOUNDS, CollectorRegistry()).labels()
    for _ in range(10 * COUNT_AT + 1):
        observations.observe(1.0)
    assert len(observations._aside) < COUNT_AT
    assert observations.counted() == ([0, 0, 0, 10 * COUNT_AT + 1, 10 * COUNT_AT + 1], 10 * COUNT_AT + 1)


def test_no_observation_of_several_threads_is_lost_while_others_count() -> None:
    registry = CollectorRegistry()
    histogram = BulkHistogram("wait_seconds", "Waiting.", ("who",), BOUNDS, registry)

    def observe(_: int) -> None:
        for _ in range(5000):
            histogram.labels("anna").observe(0.5)

    with ThreadPoolExecutor(5) as pool:
        work = [pool.submit(observe, thread) for thread in range(4)]
        while not all(each.done() for each in work):
            generate_latest(registry)
    assert registry.get_sample_value("wait_seconds_count", {"who": "anna"}) == 20_000


def test_one_name_is_registered_once() -> None:
    registry = CollectorRegistry()
    BulkHistogram("images", "Images.", (), BOUNDS, registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        BulkHistogram("images", "Images.", (), BOUNDS, registry)
