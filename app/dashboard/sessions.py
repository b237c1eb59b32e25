"""Signing in with an API key, and out; and the files that all pages load."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse

from app.api.conditional import PreconditionsOf, not_modified
from app.api.dependencies import ServicesOf
from app.api.rate_limits import count_failure
from app.contracts.errors import Problem, ProblemError
from app.dashboard.pages import page
from app.dashboard.route import COOKIE, OpenRoute, form_of
from app.storage.api_keys import KeyRefused
from app.storage.sessions import SESSION_S
from worker.engine.catalog.drawing.style import STYLE

router = APIRouter(route_class=OpenRoute, include_in_schema=False)

STATIC = Path(__file__).parent / "static"
PARTS = {
    "dashboard.css": (f"{STYLE}{(STATIC / 'dashboard.css').read_text()}".encode(), "text/css; charset=utf-8"),
    "htmx.js": ((STATIC / "htmx.min.js").read_bytes(), "text/javascript; charset=utf-8"),
}
"""The files that pages load. The style sheet begins with that of the report."""


@router.get("/dashboard/static/{name}")
def part(name: str, preconditions: PreconditionsOf) -> Response:
    if name not in PARTS:
        raise ProblemError(Problem.NOT_FOUND, f"the dashboard has no file '{name}'")
    content, media_type = PARTS[name]
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    if preconditions.is_current(etag):
        return not_modified(etag)
    headers = {"ETag": etag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=media_type, headers=headers)


@router.post("/dashboard/login")
async def log_in(request: Request, services: ServicesOf) -> Response:
    """Begin a session of who sends an API key, and go on to the page that was asked for."""
    fields = dict(await form_of(request))
    goal = _own_path(fields.get("next", "/"))
    try:
        token = await run_in_threadpool(services.sessions.begin, fields.get("key", "").strip())
    except KeyRefused as error:
        await run_in_threadpool(count_failure, services, request)
        return page(request, "login.html", 401, detail=str(error), next=goal, is_followed=False)
    response = RedirectResponse(goal, 303)
    response.set_cookie(
        COOKIE, token, SESSION_S, httponly=True, samesite="strict", secure=request.scope["scheme"] == "https"
    )
    return response


@router.post("/dashboard/logout")
async def log_out(request: Request, services: ServicesOf) -> Response:
    """End the session."""
    await run_in_threadpool(services.sessions.end, request.cookies.get(COOKIE, ""))
    response = RedirectResponse("/", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


def _own_path(text: str) -> str:
    """Return a page of the dashboard by its path, and the first page for anything else, such as another address."""
    is_own = text.startswith("/dashboard/") and text.isascii() and text.isprintable()
    return text if is_own or text == "/" or text.startswith("/?") else "/"
