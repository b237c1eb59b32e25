"""Makes the OpenAPI document: FastAPI's own, with the answers added that it cannot see in the routes."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from app.contracts.errors import MEDIA_TYPE

SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, `mm_…`. While none was ever made, requests from this machine need none.",
}
Responses = dict[int | str, dict[str, Any]]

NOTES = """Every refusal is a problem document (RFC 9457) with a stable `code`. HEAD is answered wherever GET is, with
the same headers. Refused is what goes to a host that the service is not, and what pages of others ask to change."""
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
    """FastAPI with other descriptions of refusals and of optional parameters."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["info"]["description"] = NOTES
            document["components"]["securitySchemes"] = {"key": SCHEME}
            for operation in _operations(document):
                operation.setdefault("security", [{"key": []}])
                for status, response in operation["responses"].items():
                    if status in ("4XX", "5XX"):  # they have the media type of the route's success else
                        schema = {"$ref": "#/components/schemas/ProblemBody"}
                        response["content"] = {MEDIA_TYPE: {"schema": schema}}
                for parameter in operation.get("parameters", ()):
                    _without_null(parameter["schema"])
        return self.openapi_schema or {}


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        yield from operations.values()


def _without_null(schema: dict[str, Any]) -> None:
    """Drops null from a parameter's types: a parameter is left out instead."""
    kinds = [kind for kind in schema.pop("anyOf", ()) if kind != {"type": "null"}]
    schema.update(kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})
