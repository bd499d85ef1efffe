"""Traces as a collector receives them; whatever the collector does, callers are answered."""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collected
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collecting
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.config import InvalidConfig, load_config
from service.graph_cache import GraphCache
from service.metrics import Metrics
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import defense_ensemble_pb2 as pb
from service.server import CannotStart
from service.tracing import EXPORT_SECONDS, Exporter, Processor, Trace
from tests.service.serving import Running, random_pixels, raw, request, serving

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}"
Metadata = tuple[tuple[str, str | bytes], ...]
CLASSIFY = "phalanx.v1.DefenseEnsemble/Classify"
SECONDS = 20.0
both = pytest.mark.parametrize("front_end", ["grpcio", "native"])


@dataclass
class Collector(collecting.TraceServiceServicer):
    """Keeps what it is sent."""

    received: queue.SimpleQueue[tuple[dict[str, str], Span]] = field(default_factory=queue.SimpleQueue)
    address: str = ""

    def Export(self, request: Any, _: grpc.ServicerContext) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            about = {each.key: each.value.string_value or str(each.value.int_value) for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.received.put((about, span))
        return collected.ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        """All of them; to be asked after the server has ended, which exports what is left."""
        found = []
        while not self.received.empty():
            found.append(self.received.get()[1])
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    server, own = grpc.server(ThreadPoolExecutor(2)), Collector()
    collecting.add_TraceServiceServicer_to_server(own, server)  # type: ignore[no-untyped-call]
    own.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield own
    server.stop(None).wait()


@contextmanager
def traced(bundle: Path, graphs: GraphCache, endpoint: str, sample: float = 1.0, **sections: Any) -> Iterator[Running]:
    tracing = {"endpoint": endpoint, "sample": sample}
    with serving(bundle, graphs, tracing=tracing, **{"ensembles": {"full": {}}, **sections}) as running:
        yield running


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}


def classify(running: Running, metadata: Metadata) -> None:
    running.native.Classify(request(random_pixels(3)), metadata=metadata)


def infer(running: Running, metadata: Metadata) -> None:
    pixels = random_pixels(3)
    tensor = open_inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=pixels.shape)
    message = open_inference_pb2.ModelInferRequest(model_name="full", inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    running.open_inference.ModelInfer(message, metadata=metadata)


@both
@pytest.mark.parametrize(
    ("ask", "name"), [(classify, CLASSIFY), (infer, "inference.GRPCInferenceService/ModelInfer")], ids=["Classify", "ModelInfer"]
)
def test_a_request_and_its_stages_are_spans_of_the_callers_trace(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, ask: Callable[..., None], name: str, front_end: str
) -> None:
    before = time.time_ns()
    with traced(tiny_bundle, graphs, collector.address, sample=0.0, front_end=front_end) as running:
        ask(running, (("traceparent", PARENT.format(flags="01")), ("tracestate", "shop=1"), ("x-request-id", "tile-7")))
    whole, *stages = sorted(collector.spans(), key=lambda span: span.kind != Span.SPAN_KIND_SERVER)
    assert (whole.name, whole.trace_id.hex(), whole.parent_span_id.hex()) == (name, PARENT.split("-")[1], PARENT.split("-")[2])
    assert whole.trace_state == "shop=1"
    told = attributes(whole)
    assert told["rpc.method"] == name
    assert (told["rpc.system.name"], told["rpc.response.status_code"]) == ("grpc", "OK")
    assert (told["phalanx.ensemble"], told["phalanx.caller"], told["phalanx.request_id"]) == ("full", "anonymous", "tile-7")
    assert told["phalanx.images"] == sum(v for key, v in told.items() if key.startswith("phalanx.images.")) == 3
    assert [stage.name for stage in stages] == ["decode", "queue", "compute", "encode"]
    assert all((stage.parent_span_id, stage.trace_id) == (whole.span_id, whole.trace_id) for stage in stages)
    moments = [moment for stage in stages for moment in (stage.start_time_unix_nano, stage.end_time_unix_nano)]
    assert moments == sorted(moments)
    assert before <= whole.start_time_unix_nano <= moments[0] + 1_000_000  # clocks of two kinds
    assert moments[-1] <= whole.end_time_unix_nano + 1_000_000
    assert whole.status.code == Status.STATUS_CODE_UNSET


def test_stages_are_counted_from_the_start_whenever_the_answer_is_noticed() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    trace, now = Trace(tracer.start_span("whole"), tracer), time.perf_counter()
    trace.stage("decode", now - 10, now - 9)
    trace.then("queue", 1)
    trace.then("compute", 2)
    trace.then("compute", 100)  # of several lanes, all in all
    trace.finish("OK", {})
    *stages, whole = exporter.get_finished_spans()
    begins, ends = ([getattr(stage, moment) for stage in stages] for moment in ("start_time", "end_time"))
    assert begins[1:] == ends[:-1]
    seconds = [(end - begin) / 1e9 for begin, end in zip(begins, ends, strict=True)]
    assert seconds == pytest.approx([1, 1, 2, 6], abs=0.5)
    assert ends[-1] <= whole.end_time


@both
def test_every_request_of_a_stream_has_a_span(tiny_bundle: Path, graphs: GraphCache, collector: Collector, front_end: str) -> None:
    with traced(tiny_bundle, graphs, collector.address, front_end=front_end) as running:
        asked = [pb.ClassifyStreamRequest(id=str(i), image=raw(image)) for i, image in enumerate(random_pixels(4))]
        asked.append(pb.ClassifyStreamRequest(id="bad"))
        assert len(list(running.native.ClassifyStream(iter(asked)))) == 5
    whole = [span for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER]
    codes = sorted(attributes(span)["rpc.response.status_code"] for span in whole)
    assert codes == ["INVALID_ARGUMENT", "OK", "OK", "OK", "OK"]
    assert {span.name for span in whole} == {"phalanx.v1.DefenseEnsemble/ClassifyStream"}


@both
def test_what_goes_wrong_is_told_and_trouble_of_ours_is_an_error(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, front_end: str
) -> None:
    with traced(tiny_bundle, graphs, collector.address, front_end=front_end) as running:
        with pytest.raises(grpc.RpcError):
            running.native.Classify(request(random_pixels(1), "nobody"))
        with pytest.raises(grpc.RpcError):
            running.native.Classify(pb.ClassifyRequest(), timeout=SECONDS)
        running.server._gate.refusing.set()
        with pytest.raises(grpc.RpcError):
            running.native.Classify(request(random_pixels(1)))
    found = {attributes(span)["rpc.response.status_code"]: span for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER}
    assert found.keys() == {"NOT_FOUND", "INVALID_ARGUMENT", "UNAVAILABLE"}
    assert found["NOT_FOUND"].status.code == Status.STATUS_CODE_UNSET
    assert found["UNAVAILABLE"].status.code == Status.STATUS_CODE_ERROR


@pytest.mark.parametrize(
    ("sample", "metadata", "spans"),
    [
        pytest.param(1.0, (), True, id="all are sampled"),
        pytest.param(0.0, (), False, id="none is"),
        pytest.param(1.0, (("traceparent", PARENT.format(flags="00")),), False, id="the caller said no"),
        pytest.param(1.0, (("traceparent", "00-what-is-this"),), True, id="a parent that is none"),
    ],
)
def test_who_is_sampled(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, sample: float, metadata: Metadata, spans: bool
) -> None:
    with traced(tiny_bundle, graphs, collector.address, sample) as running:
        running.native.Classify(request(random_pixels(1)), metadata=metadata)
    assert bool(collector.spans()) == spans


def test_the_log_names_the_trace(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), traced(tiny_bundle, graphs, collector.address, logging={"requests": "all"}) as running:
        running.native.Classify(request(random_pixels(1)), metadata=(("traceparent", PARENT.format(flags="01")),))
    lines = [record.__dict__["trace_id"] for record in caplog.records if "trace_id" in record.__dict__]
    assert lines == [PARENT.split("-")[1]]


@pytest.fixture(params=["nobody listens", "nobody answers"])
def deaf(request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint where spans are lost."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@both
def test_a_collector_that_is_gone_or_deaf_costs_no_answer_and_no_end(
    tiny_bundle: Path, graphs: GraphCache, deaf: str, front_end: str
) -> None:
    shutdown = {"notice_seconds": 0, "drain_seconds": 60}
    with traced(tiny_bundle, graphs, deaf, front_end=front_end, shutdown=shutdown) as running:
        for seed in range(50):
            running.native.Classify(request(random_pixels(1, seed)), timeout=SECONDS)
        began = time.monotonic()
    assert time.monotonic() - began < EXPORT_SECONDS + 3.0


def test_lost_spans_are_counted_and_told_once_a_minute(deaf: str, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    exporter = Exporter(OTLPSpanExporter(deaf, insecure=True, timeout=0.2), deaf, metrics.tracing())
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for _ in range(3):
        provider.get_tracer("test").start_span("lost").end()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.tracing"]
    assert line.startswith(f"1 spans are lost: no collector takes them at {deaf}")
    assert metrics.registry.get_sample_value("phalanx_spans_total", {"outcome": "lost"}) == 3
    assert metrics.registry.get_sample_value("phalanx_spans_total", {"outcome": "exported"}) == 0


class Slow(SpanExporter):
    """Takes a batch when it is let."""

    def __init__(self) -> None:
        self.asked, self.let = threading.Event(), threading.Event()

    def export(self, _: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.let.wait(SECONDS)
        return SpanExportResult.SUCCESS


def test_spans_that_find_no_room_behind_a_slow_collector_are_counted_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    metrics, slow, room = Metrics(), Slow(), 600
    provider = TracerProvider()
    provider.add_span_processor(Processor(Exporter(slow, "http://slow", metrics.tracing()), room))
    tracer = provider.get_tracer("test")
    for _ in range(512):  # a batch
        tracer.start_span("exported").end()
    assert slow.asked.wait(SECONDS)
    for _ in range(room + 70):
        tracer.start_span("waits, or is lost").end()
    assert metrics.registry.get_sample_value("phalanx_spans_total", {"outcome": "lost"}) == 70
    slow.let.set()
    provider.shutdown()
    assert metrics.registry.get_sample_value("phalanx_spans_total", {"outcome": "exported"}) == 512 + room
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.tracing"]
    assert line.startswith("1 spans are lost: no collector takes them at http://slow")


def test_callers_cannot_write_to_the_log(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    headers = (("traceparent", PARENT.format(flags="01")), ("tracestate", "no state, at=all, = ," + "x" * 600))
    with traced(tiny_bundle, graphs, collector.address) as running:
        caplog.clear()
        running.native.Classify(request(random_pixels(1)), metadata=headers)
        assert [record.name for record in caplog.records if record.name.startswith("opentelemetry")] == []
    assert running.server.metrics.registry.get_sample_value("phalanx_spans_total", {"outcome": "exported"}) == 5


def test_the_environment_names_the_service(
    tiny_bundle: Path, graphs: GraphCache, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tiles")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.instance.id=one")
    with traced(tiny_bundle, graphs, collector.address) as running:
        running.native.Classify(request(random_pixels(1)))
    about, _ = collector.received.get()
    assert (about["service.name"], about["service.instance.id"]) == ("tiles", "one")
    assert about["deployment.environment.name"] == "test"
    assert about["process.pid"] == str(os.getpid())


def test_an_environment_that_does_not_fit_is_refused(
    tiny_bundle: Path, graphs: GraphCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
    with (
        pytest.raises(CannotStart, match=r"tracing: the environment's OTEL_ variables .*many"),
        traced(tiny_bundle, graphs, "http://127.0.0.1:4317"),
    ):
        pass


def test_without_tracing_nothing_of_it_is_loaded(tiny_bundle: Path) -> None:
    code = (
        "import sys; from service.config import ServiceConfig; from service.server import Server; "
        f"server = Server(ServiceConfig(bundle={str(tiny_bundle)!r}, listen='127.0.0.1:0', metrics=None)); server.drain(); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() == "[]"


def test_an_endpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "phalanx.yaml").write_text("tracing: {endpoint: 127.0.0.1:4317}")
    with pytest.raises(InvalidConfig, match=r"tracing\.endpoint"):
        load_config(tmp_path / "phalanx.yaml", {})


def test_instances_are_told_apart(tiny_bundle: Path, graphs: GraphCache, collector: Collector) -> None:
    for _ in range(2):
        with traced(tiny_bundle, graphs, collector.address) as running:
            running.native.Classify(request(random_pixels(1)))
    about = []
    while not collector.received.empty():
        about.append(collector.received.get()[0])
    assert {each["service.name"] for each in about} == {"phalanx"}
    assert len({each["service.instance.id"] for each in about}) == 2
