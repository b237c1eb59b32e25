"""Makes the OpenAPI document: FastAPI's own, with the answers added that it cannot see in the routes."""

import json
from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from app.api.examples import answers, queued_job
from app.api.links import add_links
from app.api.observed import Observed
from app.contracts.errors import MEDIA_TYPE, Problem, ProblemError

SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, `mm_…`. While none was ever made, requests from this machine need none.",
}
_writing = Lock()
Responses = dict[int | str, dict[str, Any]]

NOTES = """Every refusal is a problem document (RFC 9457) with a stable `code`. HEAD is answered wherever GET is, with
the same headers. Refused is what goes to a host that the service is not, and what pages of others ask to change."""
ANYWHERE = (400, 408, 421, 431, 500, 503)
"""Statuses of the refusals that every operation has."""
SAID_BY_HEADERS = {
    401: {"WWW_Authenticate": "What the request lacks"},
    415: {"Accept_Encoding": "Encodings of the body that are taken, where another was sent"},
    416: {"Content_Range": "Number of bytes that there are"},
    429: {"Retry_After": "Seconds after which to try again"},
    503: {"Retry_After": "Seconds after which to try again, where that is known"},
}
RANGES: dict[str, Any] = {
    "parameters": [
        {
            "name": "range",
            "in": "header",
            "schema": {"type": "string"},
            "description": "`bytes=FIRST-LAST`, or several",
        },
        {"name": "if-range", "in": "header", "schema": {"type": "string"}, "description": "ETag of which `range` is"},
    ]
}


def problems(*statuses: int) -> Responses:
    """Return the refusals of a route that do not follow from what it takes, by their statuses."""
    return {status: {"description": "Refused"} for status in statuses}


def headers(**meanings: str) -> dict[str, Any]:
    """Describes a response's headers, each a string; keyword names stand for the headers' names."""
    return {
        name.replace("_", "-"): {"description": meaning, "schema": {"type": "string"}}
        for name, meaning in meanings.items()
    }


ETAG = headers(ETag="Changes when the content does")
NOT_MODIFIED: dict[str, Any] = {"description": "`If-None-Match` names the present content", "headers": ETAG}
ACCEPTED: Responses = {
    202: {
        "description": "The job is queued",
        "headers": headers(
            Location="Where the job is", Preference_Applied="Which preference of `Prefer` was honoured, if any"
        ),
    }
}


def file_responses(media_type: str) -> Responses:
    """Return the responses of a route that sends a file of this type."""
    content: dict[str, Any] = {media_type: {}}  # there is no schema, because a part of a JSON file is not JSON
    described = headers(
        ETag="Changes when the content does",
        Repr_Digest="The file's sha256 (RFC 9530)",
        Content_Disposition="The file's name",
        Accept_Ranges="`bytes`",
    )
    part = {**described, **headers(Content_Range="Which bytes of how many, where it is one range")}
    parts = {**content, "multipart/byteranges": {}}
    return {
        200: {"description": "The file", "content": content, "headers": described},
        206: {"description": "The parts that `Range` asks for", "content": parts, "headers": part},
        304: NOT_MODIFIED,
    }


class Api(FastAPI):
    """FastAPI with other descriptions of refusals and of optional parameters, with links between operations.

    Its every answer is observed.
    """

    _written: bytes | None = None

    def build_middleware_stack(self) -> ASGIApp:
        """Put `Observed` around the middleware that answers unexpected errors, which no other is around."""
        return Observed(super().build_middleware_stack(), self.state.metrics, self.state.tracer)

    def written(self) -> bytes:
        """Return the document as JSON. It is made once, by one thread."""
        with _writing:
            if self._written is None:
                self._written = json.dumps(self.openapi(), ensure_ascii=False, separators=(",", ":")).encode()
            return self._written

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["info"]["description"] = NOTES
            document["components"]["securitySchemes"] = {"key": SCHEME}
            document["components"]["responses"] = {_name(status): _refusal(status) for status in _codes()}
            for method, path, operation in _operations(document):
                operation.setdefault("security", [{"key": []}])
                found = operation["responses"]
                refusals = _refusals(method, path, operation) | {int(s) for s in found if s.isdigit() and int(s) >= 400}
                kept = {status: answer for status, answer in found.items() if status[0] in "123"}
                references = {str(s): {"$ref": f"#/components/responses/{_name(s)}"} for s in sorted(refusals)}
                operation["responses"] = kept | references
                for parameter in operation.get("parameters", ()):
                    _without_null(parameter["schema"])
            _add_examples(document)
            add_links(list(_operations(document)))
            for schema in document["components"]["schemas"].values():
                name = schema.get("properties", {}).get("name", {})
                if "const" in name:
                    name.setdefault("description", "Name of the method, by which its parameters are told from others'.")
        return self.openapi_schema or {}


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield every operation with its method and path."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation


def _add_examples(document: dict[str, Any]) -> None:
    """Show what every successful answer that is JSON looks like."""
    known = {name: example.model_dump(mode="json") for name, example in answers().items()}
    queued = queued_job().model_dump(mode="json")
    for _, _, operation in _operations(document):
        for status, answer in operation["responses"].items():
            found = answer.get("content", {}).get("application/json") if status.startswith("2") else None
            if found is not None:
                name = found["schema"]["$ref"].rpartition("/")[2]
                found["example"] = queued if name == "Job" and status == "202" else known[name]


def _refusals(method: str, path: str, operation: dict[str, Any]) -> set[int]:
    """Return the statuses of the refusals that follow from what an operation takes; its route declares all others."""
    found = set(ANYWHERE)
    names = {parameter["name"] for parameter in operation.get("parameters", ())}
    if operation["security"]:
        found |= {401, 403, 429} & set(_codes())
    if method != "get":
        found.add(403)  # pages of other origins
    if "{" in path:
        found.add(404)
    if "requestBody" in operation:
        found |= {413, 415, 422}
    if "if-match" in names:
        found.add(412)
    if "range" in names:
        found.add(416)
    return found


@cache
def _codes() -> dict[int, list[Problem]]:
    """Return the problems of each status."""
    found: dict[int, list[Problem]] = {}
    for problem in Problem:
        found.setdefault(problem.status, []).append(problem)
    return found


def _name(status: int) -> str:
    return f"Problem{status}"


def _refusal(status: int) -> dict[str, Any]:
    """Describe the refusals of one status: their codes, and one of them in full."""
    found = _codes()[status]
    example = ProblemError(found[0], "models.0.checkpoint: there is no local:experts/topics").body(
        "/merge", "0123456789abcdef0123456789abcdef"
    )
    described: dict[str, Any] = {
        "description": "; ".join(f"`{problem.code}`: {problem.title}" for problem in found),
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}, "example": example}},
    }
    if status in SAID_BY_HEADERS:
        described["headers"] = headers(**SAID_BY_HEADERS[status])
    return described


def _without_null(schema: dict[str, Any]) -> None:
    """Drops null from a parameter's types: a parameter is left out instead."""
    kinds = [kind for kind in schema.pop("anyOf", ()) if kind != {"type": "null"}]
    schema.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
