"""ModelStatistics, read from the very series that Prometheus scrapes: two counts of one thing could disagree."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.samples import Sample

from service.pb.inference import open_inference_pb2 as pb
from service.servicers.catalogue import Served
from service.servicers.gate import INFERENCES, Gate

NANOSECONDS = 1e9


def statistics(served: Served, gate: Gate, version: str) -> pb.ModelStatistics:
    samples = [
        sample
        for family in gate.metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("ensemble") == served.name
    ]
    requests = [sample for sample in samples if sample.labels.get("method") in INFERENCES]
    failed = int(_sum(requests, "phalanx_errors_total"))
    failed_seconds = gate.failed_seconds.get(served.name, 0.0)
    answered = int(_sum(requests, "phalanx_request_seconds_count")) - failed
    seconds = _sum(requests, "phalanx_request_seconds_sum") - failed_seconds
    return pb.ModelStatistics(
        name=served.name,
        version=version,
        last_inference=gate.last_answer_ms.get(served.name, 0),
        inference_count=int(_sum(samples, "phalanx_batch_images_sum")),
        execution_count=int(_sum(samples, "phalanx_batch_images_count")),
        inference_stats=pb.InferStatistics(
            success=_duration(answered, seconds),
            fail=_duration(failed, failed_seconds),
            queue=_duration(answered, _stage(samples, "queue")),
            compute_input=_duration(answered, _stage(samples, "decode")),
            compute_infer=_duration(answered, _stage(samples, "compute")),
            compute_output=_duration(answered, _stage(samples, "encode")),
        ),
    )


def _stage(samples: Iterable[Sample], stage: str) -> float:
    """All the time spent in it.  Its own count runs ahead by the requests under way, and perf_analyzer stops at that."""
    return _sum([sample for sample in samples if sample.labels.get("stage") == stage], "phalanx_stage_seconds_sum")


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=max(count, 0), ns=max(int(seconds * NANOSECONDS), 0))


def _sum(samples: Iterable[Sample], name: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name)
