"""Fills in the dashboard's pages, and says what a browser may do with them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse

from app.contracts.api_keys import Caller, Scope
from app.contracts.errors import ProblemError
from worker.engine.catalog.drawing.html import environment

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with none at all, browsers hide the origin of forms, by which they are admitted
    "Cache-Control": "no-store",
}
TEMPLATES = environment(Path(__file__).parent / "templates")


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Fill in a page for who sends the request. Values are escaped unless they are markup."""
    caller: Caller | None = getattr(request.state, "caller", None)
    shown = TEMPLATES.get_template(template).render(
        path=request.url.path,
        caller=caller,
        may_write=caller is not None and caller.may(Scope.WRITE),
        **values,
    )
    return HTMLResponse(shown, status, headers=HEADERS)


def problem_page(request: Request, error: ProblemError) -> HTMLResponse:
    """Return the page that says why a request is refused."""
    shown = page(request, "problem.html", error.problem.status, problem=error.problem, detail=error.detail)
    shown.headers.update(error.headers)
    return shown


def _size(count: float) -> str:
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:.3g} {unit}"
    return f"{count:.0f} bytes"


def _span(seconds: float | None) -> str:
    """Format a length of time as people say it."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _moment(time: datetime | None) -> str:
    return "-" if time is None else time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _query(values: Mapping[str, Any]) -> str:
    """Write a query string of the values that there are."""
    return urlencode({name: value for name, value in values.items() if value}, doseq=True)


TEMPLATES.filters.update(size=_size, span=_span, moment=_moment, share=_share, number=_number, query=_query)
