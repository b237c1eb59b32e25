"""Bodies that are YAML, on routes that take JSON: our own requests, or recipes of mergekit."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.types import Message

from app.contracts.errors import FieldError, Problem, ProblemError
from app.services.mergekit import MergekitError, translated
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
            content = await run_in_threadpool(_request_in, await request.body())
            sent = json.dumps(content).encode()

            async def receive() -> Message:
                return {"type": "http.request", "body": sent, "more_body": False}

            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
            return await handle(Request(scope, receive))

        return handler


def _request_in(body: bytes) -> Any:
    """Of a recipe of mergekit its translation, of any other what it says."""
    try:
        content = parse_yaml(body)
        if isinstance(content, dict) and "merge_method" in content and "method" not in content:
            return translated(content)
    except NotYaml as error:
        raise ProblemError(Problem.MALFORMED, f"the body is not YAML as it is taken here: {error}") from error
    except MergekitError as error:
        errors = [FieldError(field=error.field, message=error.message)]
        raise ProblemError(Problem.INVALID_REQUEST, str(error), errors) from error
    return content
