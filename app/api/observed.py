"""Every request has an id, is logged, and is counted."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.metrics import ApiMetrics
from app.observability.context import REQUEST_ID, concerning, new_request_id
from app.observability.traces import Span, Tracer

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PROBES = ("/healthz", "/readyz", "/metrics")  # asked every few seconds, and of no interest where they are answered

logger = logging.getLogger("app.access")


class Observed:
    """Middleware around all others, so that it sees what they answer too.

    The request's id is that of its header `X-Request-ID` if it has a proper one.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, tracer: Tracer) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        sent = _sent(scope, b"x-request-id")
        request_id = sent if sent and REQUEST_ID.fullmatch(sent) else new_request_id()
        span = Span()
        if scope["path"] not in PROBES:
            span = self._tracer.span("request", "server", _sent(scope, b"traceparent"))
        answered: dict[str, Any] = {}
        scope["state"] = state = {**scope.get("state", {})}

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.update(status=message["status"], seconds=time.perf_counter() - start)
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        with concerning(request_id=request_id, **span.facts):
            try:
                await self._app(scope, receive, observe)
            finally:
                # Middleware copies the scope, so routes say in the state, which the copies share, which they are.
                route = state.get("route") or getattr(scope.get("route"), "path", "")
                self._tell(span, scope["method"], str(route), **answered)

    def _tell(self, span: Span, method: str, route: str, status: int | None = None, seconds: float = 0.0) -> None:
        """Log a request, count it and end its span; `status` is None where the client went before an answer."""
        method = method if method in METHODS else "other"  # which methods there are is for clients to invent
        ms = round(1000 * seconds, 1)
        level = logging.DEBUG if route in PROBES and status == 200 else logging.INFO
        if logger.isEnabledFor(level):
            extra = {"method": method, "route": route, "status": status, "ms": ms}
            logger.log(
                level, "%s %s %s in %.1f ms", method, route or "(no route)", status or "unanswered", ms, extra=extra
            )
        span.rename(f"{method} {route}".strip())
        span.add(http__request__method=method, http__route=route, http__response__status_code=status or 0)
        span.end(failed=status is None or status >= 500)
        if status is not None:
            self._metrics.count(method, route, status, seconds)


def _sent(scope: Scope, header: bytes) -> str | None:
    """Return what a header says, if it is there once."""
    found = [value.decode("latin-1") for name, value in scope["headers"] if name == header]
    return found[0] if len(found) == 1 else None
