"""Routes of the dashboard: who asks is known by a session, and what is refused is said on a page."""

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.datastructures import Headers

from app.api.authentication import authenticate, caller_by_key, unauthenticated
from app.api.hosts import READS, check_origin
from app.api.strict_route import StrictRoute
from app.contracts.api_keys import Caller, Scope
from app.contracts.errors import Problem, ProblemError
from app.dashboard.pages import page, problem_page
from app.storage.api_keys import ApiKeys, KeyRefused

COOKIE = "maskmerge_session"
FORM = "application/x-www-form-urlencoded"
MOST_FIELDS = 5000
GONE = (Problem.UNAUTHENTICATED, Problem.INSUFFICIENT_SCOPE, Problem.NOT_FOUND)
"""Problems at which a page that renews a part of itself has to be loaded anew; at others it goes on trying."""


class DashboardRoute(StrictRoute):
    """A route whose caller is known by the session's cookie, or as callers of the API are. It answers with pages.

    The cookie counts here and nowhere else. Changes are only taken from this service's own pages: not from those that
    MASKMERGE_CORS_ORIGINS names either, since these have keys of their own.
    """

    def admit(self, request: Request, needed: Scope) -> None:
        authenticate(request, needed, _caller)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                if request.method not in READS:
                    headers = Headers(scope=request.scope)
                    check_origin(headers, headers["host"], request.scope["scheme"])
                return await handle(request)
            except ProblemError as error:
                shown = _refused(request, error)
                if "hx-request" in request.headers and error.problem in GONE:
                    shown.headers["HX-Refresh"] = "true"
                return shown
            except RequestValidationError:
                return problem_page(request, ProblemError(Problem.NOT_FOUND, f"there is no {request.url.path}"))
            except RedisError:
                detail = "Redis does not answer; this page is there again as soon as it does"
                return problem_page(
                    request, ProblemError(Problem.REDIS_UNAVAILABLE, detail, None, **{"Retry-After": "2"})
                )

        return handler


class OpenRoute(DashboardRoute):
    """A route of the dashboard that anybody may call."""

    is_public = True


async def form_of(request: Request) -> list[tuple[str, str]]:
    """Return the fields of a form in their order. Raises ProblemError."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != FORM:
        raise ProblemError(Problem.UNSUPPORTED_MEDIA_TYPE, f"send the form as {FORM}")
    try:
        text = (await request.body()).decode()
        return parse_qsl(text, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict")
    except ValueError as error:
        raise ProblemError(Problem.MALFORMED, "the form is no text in UTF-8, or has too many fields") from error


def _caller(request: Request, keys: ApiKeys) -> Caller:
    token = request.cookies.get(COOKIE)
    if token is None or "authorization" in request.headers:
        return caller_by_key(request, keys)
    try:
        caller: Caller = request.app.state.services.sessions.caller(token)
    except KeyRefused as error:
        raise unauthenticated(str(error)) from error
    return caller


def _refused(request: Request, error: ProblemError) -> Response:
    if error.problem is not Problem.UNAUTHENTICATED:
        return problem_page(request, error)
    site, destination = request.headers.get("sec-fetch-site"), request.headers.get("sec-fetch-dest")
    # A link from another site brings no cookie, which is strict. The page loads itself again, and then it is there.
    is_followed = site in ("cross-site", "same-site") and destination == "document" and request.method == "GET"
    query = f"?{request.url.query}" if request.url.query else ""
    shown = page(
        request,
        "login.html",
        401,
        detail=error.detail if COOKIE in request.cookies else None,
        next=f"{request.url.path}{query}" if request.method == "GET" else "/",
        is_followed=is_followed,
    )
    shown.headers.update(error.headers)
    return shown
