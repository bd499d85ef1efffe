"""OpenTelemetry traces (extra `tracing`): a span for each request, and below it one for each of its stages.

All that a span says is known when the request ends, so that nothing is begun or switched on the way: who answers only notes
when stages ended. Spans are exported by a thread of the SDK; a collector that is slow, deaf or gone costs spans and nothing else.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping

import grpc
from opentelemetry.context import Context as Parent
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.config import TracingConfig
from service.context import Context
from service.own_version import own_version
from service.pb.inference import open_inference_pb2
from service.pb.phalanx.v1 import admin_pb2, defense_ensemble_pb2

EXPORT_SECONDS = 5.0  # for one batch of spans
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

    def __init__(self, config: TracingConfig) -> None:
        exporter = OTLPSpanExporter(config.endpoint, insecure=not config.endpoint.startswith("https:"), timeout=EXPORT_SECONDS)
        own = {"service.name": "phalanx", "service.version": own_version(), "service.instance.id": str(uuid.uuid4())}
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample)), resource=Resource.create(own), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
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
        """Export what waits, for no longer than so many seconds."""
        ending = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(timeout)


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
        """One of the request's stages, in their order; none begins before the one before has ended."""
        earliest = self._stages[-1][2] if self._stages else began
        self._stages.append((name, min(max(began, earliest), ended), ended))

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
