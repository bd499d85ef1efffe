"""OpenTelemetry traces (extra `tracing`): a span for each request, and below it one for each of its stages.

All that a span says is known when the request ends, so that nothing is begun or switched on the way: who answers only notes
when stages ended. Spans are exported by a thread of the SDK; a collector that is slow, deaf or gone costs spans and nothing else:
they are counted, and a line a minute tells how many. The SDK's own log is silent, as any caller could write to it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence

import grpc
from opentelemetry.context import Context as Parent
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.config import TracingConfig
from service.context import Context
from service.metrics import TracingMetrics
from service.own_version import own_version
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import admin_pb2, defense_ensemble_pb2
from service.seldom import Seldom

log = logging.getLogger(__name__)

MOST_WAITING = 2048  # spans, where OTEL_BSP_MAX_QUEUE_SIZE does not say it
EXPORT_SECONDS = 5.0  # for one batch of spans, and for all that wait when the server ends
SILENT_SECONDS = 60.0  # between two lines about lost spans
PARENT_KEYS = ("traceparent", "tracestate")  # of W3C Trace Context
# That mean trouble here, and not a caller's mistake (OpenTelemetry's conventions for gRPC servers)
ERRORS = frozenset(
    code.name
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)


class Tracing:
    """Where requests become traces. Thread-safe."""

    def __init__(self, config: TracingConfig, metrics: TracingMetrics) -> None:
        """Raises ValueError where an `OTEL_` variable of the environment, which all OpenTelemetry software reads, is broken."""
        own = {"service.name": "phalanx", "service.version": own_version(), "service.instance.id": str(uuid.uuid4())}
        try:
            exporter = OTLPSpanExporter(config.endpoint, insecure=not config.endpoint.startswith("https:"), timeout=EXPORT_SECONDS)
            self._provider = TracerProvider(
                sampler=ParentBased(TraceIdRatioBased(config.sample)),
                resource=Resource.create({**own, "process.pid": os.getpid()}).merge(OTELResourceDetector().detect()),
                shutdown_on_exit=False,
            )
            room = int(os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, MOST_WAITING))
            self._provider.add_span_processor(Processor(Exporter(exporter, config.endpoint, metrics), room))
        except Exception as error:  # the SDK raises what its parsers raise
            raise ValueError(f"the environment's OTEL_ variables do not fit: {error}") from error
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._tracer = self._provider.get_tracer("phalanx")
        self._propagator = TraceContextTextMapPropagator()
        self._methods = dict(_full_names())

    def begin(self, method: str, context: Context) -> Trace | None:
        """A trace of this request, within the caller's if it has one; None where it is not to be sampled."""
        carrier = {key: value for key, value in context.invocation_metadata() if key in PARENT_KEYS and isinstance(value, str)}
        parent = self._propagator.extract(carrier) if carrier else Parent()
        name = self._methods.get(method, method)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, {"rpc.system.name": "grpc", "rpc.method": name})
        return Trace(span, self._tracer) if span.is_recording() else None

    def close(self, timeout: float) -> None:
        """Export what waits, for no longer than so many seconds, and EXPORT_SECONDS at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(min(timeout, EXPORT_SECONDS))


class Processor(BatchSpanProcessor):
    """The SDK's, which forgets without a count what finds no room in its queue: here such a span does not get there."""

    def __init__(self, exporter: Exporter, room: int) -> None:
        super().__init__(exporter, room)
        self._spans, self._room = exporter, room

    def on_end(self, span: ReadableSpan) -> None:
        if self._spans.await_one(self._room):
            super().on_end(span)


class Exporter(SpanExporter):
    """Another exporter, of whose failures operators hear. Exports in one thread."""

    def __init__(self, exporter: SpanExporter, endpoint: str, metrics: TracingMetrics) -> None:
        self._exporter, self._endpoint, self._metrics = exporter, endpoint, metrics
        self._lock = threading.Lock()  # guards _waiting
        self._waiting = 0  # spans on their way here
        self._lost = Seldom()

    def await_one(self, room: int) -> bool:
        """Count in a span that is to come; False, and it is lost, where so many are awaited already."""
        with self._lock:
            if self._waiting < room:
                self._waiting += 1
                return True
        self._lose(1)
        return False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._lock:
            self._waiting -= len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception:  # a span that cannot be encoded
            log.exception("%d spans cannot be exported", len(spans))
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self._metrics.exported(len(spans))
        else:
            self._lose(len(spans))
        return result

    def _lose(self, spans: int) -> None:
        self._metrics.lost(spans)
        if lost := self._lost.due(spans, SILENT_SECONDS):
            log.warning("%d spans are lost: no collector takes them at %s within %g s", lost, self._endpoint, EXPORT_SECONDS)

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Trace:
    """One request's. Moments are time.perf_counter()."""

    __slots__ = ("_ahead", "_span", "_stages", "_tracer")

    def __init__(self, span: Span, tracer: Tracer) -> None:
        self._span, self._tracer = span, tracer
        self._ahead = time.time_ns() - int(time.perf_counter() * 1e9)
        self._stages: list[tuple[str, float, float]] = []

    @property
    def id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    def stage(self, name: str, began: float, ended: float) -> None:
        """One of the request's stages, in their order."""
        self._stages.append((name, began, ended))

    def then(self, name: str, seconds: float) -> None:
        """A stage that began when the one before ended, and is over by now; of runs in two lanes at once, each counts."""
        began = self._stages[-1][2]
        self._stages.append((name, began, min(began + seconds, time.perf_counter())))

    def finish(self, code: str, attributes: Mapping[str, str | int]) -> None:
        """Nothing about pixels or scores is among the attributes: a collector need not know more than the metrics tell."""
        below = set_span_in_context(self._span, Parent())
        for name, began, ended in self._stages:
            self._tracer.start_span(name, below, start_time=self._wall(began)).end(self._wall(ended))
        self._span.set_attributes({**attributes, "rpc.response.status_code": code})
        if code in ERRORS:
            self._span.set_attribute("error.type", code)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _wall(self, moment: float) -> int:
        """Nanoseconds since the epoch."""
        return self._ahead + int(moment * 1e9)


def _full_names() -> Iterable[tuple[str, str]]:
    for file in (admin_pb2, defense_ensemble_pb2, open_inference_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield method.name, f"{service.full_name}/{method.name}"
