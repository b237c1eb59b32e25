"""Refuses requests of callers who may not send them, that have unknown parts, or say a thing twice."""

import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, get_args, get_origin

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic.fields import FieldInfo
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope as AsgiScope

from app.api.authentication import authenticate
from app.contracts.api_keys import Scope
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.jobs import JOB_ID
from app.observability.context import add_facts
from app.services.bodies import read_body
from worker.engine.catalog.primitives.strict import did_you_mean, limit_hints

JSON = "application/json"
YAML = ("application/yaml", "application/x-yaml", "text/yaml")
FEW_BYTES = 16_384  # JSON of this size is read within some milliseconds


class StrictRoute(APIRoute):
    """A route that takes the parameters that it declares, once each, and a JSON body if it declares one.

    Its caller needs an API key, see `app.api.authentication`: GET needs the scope `read`, all else `write`, unless
    `scope` names another.
    """

    media_types: tuple[str, ...] = (JSON,)
    scope: Scope | None = None
    is_public = False

    def admit(self, request: Request, needed: Scope) -> None:
        """Find out who sends a request. It asks Redis, and may block. Raises ProblemError, as `authenticate`."""
        authenticate(request, needed)

    def matches(self, scope: AsgiScope) -> tuple[Match, AsgiScope]:
        """Refuses a path that ends with a line feed, which the regular expressions of paths would match."""
        return (Match.NONE, {}) if scope["path"].endswith("\n") else super().matches(scope)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        parameters = list(_parameters(self.dependant))
        query = {alias: is_repeatable for kind, alias, is_repeatable in parameters if kind == "query"}
        once = [alias for kind, alias, is_repeatable in parameters if kind == "header" and not is_repeatable]
        has_body = self.body_field is not None
        needed = self.scope or (Scope.READ if "GET" in (self.methods or ()) else Scope.WRITE)

        async def handler(request: Request) -> Response:
            limit_hints()
            request.state.route = self.path_format
            if re.fullmatch(JOB_ID, job_id := request.path_params.get("job_id", "")):
                add_facts(job=job_id)
            if not self.is_public:
                await run_in_threadpool(self.admit, request, needed)
                request.state.body_bytes = request.app.state.services.limits.of(request.state.caller.tenant).body_bytes
                add_facts(tenant=request.state.caller.tenant)
            _check_query(request, query)
            for name in once:
                if len(request.headers.getlist(name)) > 1:
                    raise _malformed(name, "is there more than once")
            response = await handle(await self._read(request) if has_body else request)
            response.headers.update(getattr(request.state, "rate_limit", {}))
            if response.status_code == 204 and "content-type" in response.headers:  # there is no body to have it
                del response.headers["content-type"]
            return response

        return handler

    async def _read(self, request: Request) -> Request:
        """Return the request with its body read. Raises ProblemError."""
        media_type = self._media_type(request)
        try:
            body = await request.body()
        except ClientDisconnect as error:  # nobody is there to hear it
            raise ProblemError(Problem.MALFORMED, "the body ended early") from error
        is_yaml = media_type in YAML
        if is_yaml or len(body) > FEW_BYTES:  # a body that takes long to read holds up no other request
            found = await request.app.state.services.inspectors.read(body, is_yaml=is_yaml)
        else:
            found = read_body(body, is_yaml=False)
        request.state.fields_there = found.fields_there
        return _ReadRequest(request, found.content)

    def _media_type(self, request: Request) -> str:
        """Return the media type of the body. Raises ProblemError."""
        encodings = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
        if encodings not in ("", "identity"):
            detail = f"Content-Encoding is '{encodings[:100]}'; send the body as it is"
            raise ProblemError(Problem.UNSUPPORTED_MEDIA_TYPE, detail, None, **{"Accept-Encoding": "identity"})
        sent = ", ".join(request.headers.getlist("content-type"))
        media_type, *parameters = (part.strip().lower() for part in sent.split(";"))
        is_json = re.fullmatch(r"application/[a-z0-9!#$&^_.+-]+\+json", media_type)
        charsets = [part for part in parameters if part.startswith("charset")]
        is_utf8 = all(re.fullmatch(r'charset="?utf-?8"?', part) for part in charsets)
        if not (is_json or media_type in self.media_types) or not is_utf8:
            detail = f"Content-Type is '{sent[:100]}'; send {' or '.join(self.media_types[:2])}, in UTF-8"
            raise ProblemError(Problem.UNSUPPORTED_MEDIA_TYPE, detail)
        return media_type


class PublicRoute(StrictRoute):
    """A route that anybody may call: it tells nothing of any tenant."""

    is_public = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["openapi_extra"] = {**(options.get("openapi_extra") or {}), "security": []}
        super().__init__(*arguments, **options)


class _ReadRequest(Request):
    """A request with its parsed body, which FastAPI takes as JSON."""

    def __init__(self, request: Request, content: Any) -> None:
        headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
        super().__init__({**request.scope, "headers": [*headers, (b"content-type", JSON.encode())]}, request.receive)
        self._content = content

    async def body(self) -> bytes:
        return b"read"  # FastAPI only asks whether there is a body

    async def json(self) -> Any:
        return self._content


def _check_query(request: Request, known: dict[str, bool]) -> None:
    """Raises ProblemError for unknown or repeated query parameters."""
    names = [name for name, _ in request.query_params.multi_items()]
    for place, name in enumerate(names):
        if name not in known:
            hint = did_you_mean(name, list(known)) if known else "; the path takes none"
            raise _malformed(name, f"is no parameter here{hint}")
        if name in names[:place] and not known[name]:
            raise _malformed(name, "is there more than once")


def _malformed(name: str, message: str) -> ProblemError:
    shown = name[:100]
    return ProblemError(Problem.MALFORMED, f"{shown} {message}", [FieldError(field=shown, message=message)])


def _parameters(dependant: Dependant) -> Iterator[tuple[str, str, bool]]:
    """Yield (query or header, name, whether it may be repeated) for each parameter of a route and its dependencies."""
    for kind, fields in (("query", dependant.query_params), ("header", dependant.header_params)):
        for field in fields:
            yield kind, field.alias, _is_list(field.field_info)
    for inner in dependant.dependencies:
        yield from _parameters(inner)


def _is_list(info: FieldInfo) -> bool:
    return any(get_origin(part) is list for part in (info.annotation, *get_args(info.annotation)))
