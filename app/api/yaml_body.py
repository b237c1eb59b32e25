"""Bodies that are YAML, on routes that take JSON: our own requests, or recipes of mergekit."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.types import Message

from app.contracts.errors import FieldError, Problem, ProblemError
from app.services.mergekit import MergekitError, fields_there, translated
from app.services.yaml_text import NotYaml, parse_yaml

MEDIA_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")
YAML_BODY = {
    "requestBody": {
        "content": {"application/yaml": {"schema": {"type": "object", "description": "The same, or mergekit's."}}}
    }
}


def is_yaml(request: Request) -> bool:
    """Whether the body is taken for YAML: by its Content-Type, on routes that take it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type in MEDIA_TYPES and isinstance(request.scope.get("route"), YamlRoute)


class YamlRoute(APIRoute):
    """A route whose body may also be YAML; what it reads is JSON either way."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if not is_yaml(request):
                return await handle(request)
            content, request.state.fields_there = await run_in_threadpool(_request_in, await request.body())
            sent = json.dumps(content).encode()

            async def receive() -> Message:
                return {"type": "http.request", "body": sent, "more_body": False}

            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
            return await handle(Request(scope, receive))

        return handler


def as_sent(request: Request, field: str) -> str:
    """What a field of the request is called in the body: of mergekit's recipes, there. Without an index into filters,
    since the translation's are of several mappings."""
    fields: dict[str, str] = getattr(request.state, "fields_there", {})
    known = max((ours for ours in fields if field == ours or field.startswith(f"{ours}.")), key=len, default=None)
    if known is None:
        return field
    rest = field.removeprefix(known)
    return fields[known] + (rest if rest.removeprefix(".").isdecimal() else "")


def _request_in(body: bytes) -> tuple[Any, dict[str, str]]:
    """Of a recipe of mergekit its translation, and what its fields are called there; of any other what it says."""
    try:
        content = parse_yaml(body)
        if isinstance(content, dict) and "merge_method" in content and "method" not in content:
            request = translated(content)
            return request, fields_there(content, request)
    except NotYaml as error:
        raise ProblemError(Problem.MALFORMED, f"the body is not YAML as it is taken here: {error}") from error
    except MergekitError as error:
        errors = [FieldError(field=error.field, message=error.message)]
        raise ProblemError(Problem.INVALID_REQUEST, str(error), errors) from error
    return content, {}
