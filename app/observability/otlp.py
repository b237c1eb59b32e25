"""Sends spans by OTLP over HTTP. Importing it needs the extra `tracing`."""

import os

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.observability.context import Facts
from app.observability.traces import Kind, Span, Tracer

KINDS: dict[Kind, SpanKind] = {
    "server": SpanKind.SERVER,
    "consumer": SpanKind.CONSUMER,
    "internal": SpanKind.INTERNAL,
}
SEND_MS = 3000  # what a receiver that does not answer may hold up the end of a process
NAMES = TraceContextTextMapPropagator()


class OtlpSpan(Span):
    def __init__(self, span: OpenSpan) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        NAMES.inject(carrier, set_span_in_context(self._span))
        return carrier.get("traceparent")

    @property
    def facts(self) -> Facts:
        context = self._span.get_span_context()
        return {
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}",
            "trace_flags": f"{context.trace_flags:02x}",
        }

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def add(self, **attributes: str | int) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(name.replace("__", "."), value)

    def end(self, *, failed: bool = False, at_ms: int | None = None) -> None:
        if failed:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(_nanoseconds(at_ms))


class OtlpTracer(Tracer):
    def __init__(self, process: str) -> None:
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": f"maskmerge-{process}"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("maskmerge")

    def span(self, name: str, kind: Kind = "internal", parent: str | None = None, start_ms: int | None = None) -> Span:
        context = NAMES.extract({} if parent is None else {"traceparent": parent}, context=Context())
        return OtlpSpan(self._tracer.start_span(name, context, KINDS[kind], start_time=_nanoseconds(start_ms)))

    def close(self) -> None:
        self._provider.force_flush(SEND_MS)
        self._provider.shutdown()


def _nanoseconds(ms: int | None) -> int | None:
    return None if ms is None else ms * 1_000_000
