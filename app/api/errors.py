"""Every answer that is not a success has one body shape, which is made here."""

import json
import logging
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.api.yaml_body import as_sent
from app.contracts.errors import MEDIA_TYPE, FieldError, Problem, ProblemBody, ProblemError
from app.contracts.suitability import MOST_ERRORS
from app.observability.context import request_id
from app.services.bodies import field_of
from worker.engine.catalog.primitives.paths import without_paths
from worker.engine.catalog.primitives.words import message_of

BY_STATUS = {problem.status: problem for problem in reversed(Problem)}  # the first of a status is its plain one

logger = logging.getLogger(__name__)

RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ProblemBody, "description": "Refused", "content": {MEDIA_TYPE: {}}},
    "5XX": {"model": ProblemBody, "description": "Failed", "content": {MEDIA_TYPE: {}}},
}


def install(app: FastAPI) -> None:
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RedisError, _redis)
    app.add_exception_handler(Exception, _unexpected)


def answer(request: Request, error: ProblemError) -> Response:
    body = error.body(request.scope["path"], request_id() or "")
    # The body is ASCII, because it may quote half a surrogate pair from the request, which UTF-8 cannot encode.
    return Response(json.dumps(body), error.problem.status, headers=error.headers, media_type=MEDIA_TYPE)


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)  # noqa: S101 - for the type checker; the table above is the guarantee
    detail, errors = error.detail, []
    for found in error.errors:
        field = as_sent(request, found.field)
        detail = detail.replace(f"{found.field}: {found.message}", f"{field}: {found.message}", 1)
        errors.append(FieldError(field=field, message=without_paths(found.message)))
    return answer(request, ProblemError(error.problem, without_paths(detail), errors, **error.headers))


def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    found = error.errors()
    errors = [
        FieldError(field=as_sent(request, field_of(e["loc"])), message=message_of(e)) for e in found[:MOST_ERRORS]
    ]
    outside = any(e["loc"][0] != "body" for e in found)
    problem = Problem.MALFORMED if outside else Problem.INVALID_REQUEST
    if all(e["loc"][0] == "path" for e in found):  # nothing can have such an id
        return answer(request, ProblemError(Problem.NOT_FOUND, f"there is no {request.scope['path']}"))
    detail = "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors)
    if len(found) > len(errors):
        detail += f"; and {len(found) - len(errors)} more"
    return answer(request, ProblemError(problem, detail, errors))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    problem = BY_STATUS.get(error.status_code)
    if problem is None:
        problem = Problem.MALFORMED if error.status_code < 500 else Problem.INTERNAL
    detail, headers = str(error.detail), dict(error.headers or {})
    if problem is Problem.NOT_FOUND:
        detail = f"there is no route {request.method} {request.scope['path']}"
    if problem is Problem.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request))
        detail = f"{request.scope['path']} takes {headers['Allow']}"
    return answer(request, ProblemError(problem, detail, None, **headers))


def _methods(request: Request) -> Iterator[str]:
    """Yield all methods that the path takes, over all its routes; a route that refuses only knows its own."""
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        scope = {"type": "http", "method": method, "path": request.scope["path"]}
        if any(route.matches(dict(scope))[0] is Match.FULL for route in request.app.routes):
            yield from ("GET", "HEAD") if method == "GET" else (method,)


def _redis(request: Request, error: Exception) -> Response:
    logger.warning("Redis is away: %s", error)
    detail = "Redis does not answer; try again, with the same Idempotency-Key where that made a job"
    return answer(request, ProblemError(Problem.REDIS_UNAVAILABLE, detail, None, **{"Retry-After": "2"}))


def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("the request failed", exc_info=error)
    return answer(request, ProblemError(Problem.INTERNAL, "the service failed on this request; its log says why"))
