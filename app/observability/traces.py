"""Traces of requests and jobs, where somebody receives them.

A span is the time that a piece of work took, and its parent the work that it is a part of. Parents are named by the
text of a `traceparent` header (W3C Trace Context), which also travels in the job's record from the API to a worker.
"""

import logging
import os
from typing import Literal

from app.observability.context import Facts

Kind = Literal["server", "consumer", "internal"]
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

logger = logging.getLogger(__name__)


class Span:
    """A span that nobody receives."""

    @property
    def traceparent(self) -> str | None:
        """Text that names this span as a parent; None where there is none to name."""
        return None

    @property
    def facts(self) -> Facts:
        """Facts by which lines of the log name the span."""
        return {}

    def rename(self, name: str) -> None:
        """Give the span another name than it began with."""

    def add(self, **attributes: str | int) -> None:
        """Add attributes. Two underscores in a name stand for a dot."""

    def end(self, *, failed: bool = False, at_ms: int | None = None) -> None:
        """End the span, now or at a time in milliseconds since the epoch."""


class Tracer:
    """Makes spans that nobody receives."""

    def span(self, name: str, kind: Kind = "internal", parent: str | None = None, start_ms: int | None = None) -> Span:
        """Begin a span, now or at a time in milliseconds since the epoch; without a parent it begins a trace."""
        return Span()

    def close(self) -> None:
        """Send what was not sent yet, for a few seconds at most."""


def open_tracer(process: str) -> Tracer:
    """Return a tracer that sends spans by OTLP, if one of `ENDPOINTS` is set and the extra `tracing` installed.

    Only then the SDK of OpenTelemetry is imported. The rest is configured by its own variables, `OTEL_…`.
    """
    is_off = (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if is_off or not any(os.environ.get(name) for name in ENDPOINTS):
        return Tracer()
    try:
        from app.observability.otlp import OtlpTracer
    except ImportError:
        logger.warning("no traces are sent: OpenTelemetry is not installed; pip install 'maskmerge[tracing]'")
        return Tracer()
    return OtlpTracer(process)
