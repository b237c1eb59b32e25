"""Bodies that are YAML, on routes that take JSON: our own requests, or recipes of mergekit."""

from typing import Any

from fastapi import Request

from app.api.strict_route import StrictRoute
from app.contracts.errors import FieldError, Problem, ProblemError
from app.services.mergekit import MergekitError, fields_there, translated
from app.services.yaml_text import NotYaml, parse_yaml

YAML = ("application/yaml", "application/x-yaml", "text/yaml")
YAML_BODY = {
    "requestBody": {
        "content": {"application/yaml": {"schema": {"type": "object", "description": "The same, or mergekit's."}}}
    }
}


class YamlRoute(StrictRoute):
    """A route whose body may also be YAML."""

    media_types = (*StrictRoute.media_types, *YAML)

    def content(self, request: Request, media_type: str, body: bytes) -> Any:
        if media_type not in YAML:
            return super().content(request, media_type, body)
        content, request.state.fields_there = _request_in(body)
        return content


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
