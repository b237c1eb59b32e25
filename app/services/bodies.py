"""Reads bodies of requests: JSON or YAML, our own requests or recipes of mergekit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.contracts.errors import FieldError, Problem, ProblemError
from app.services.json_text import NotJson, parse_json
from app.services.mergekit import MergekitError, fields_there, translated
from app.services.yaml_text import NotYaml, parse_yaml


@dataclass(frozen=True)
class Body:
    content: Any
    """The request that the body holds; for a recipe of mergekit, its translation."""
    fields_there: dict[str, str]
    """Maps paths of fields in a translation to their paths in mergekit's recipe."""


def read_body(body: bytes, *, is_yaml: bool) -> Body:
    """Read a body as JSON or YAML. Raises ProblemError."""
    try:
        if not is_yaml:
            return Body(parse_json(body), {})
        content = parse_yaml(body)
        if isinstance(content, dict) and "merge_method" in content and "method" not in content:
            request = translated(content)
            return Body(request, fields_there(content, request))
    except NotJson as error:
        raise ProblemError(Problem.MALFORMED, f"the body is not JSON as it is taken here: {error}") from error
    except NotYaml as error:
        raise ProblemError(Problem.MALFORMED, f"the body is not YAML as it is taken here: {error}") from error
    except MergekitError as error:
        errors = [FieldError(field=error.field, message=error.message)]
        raise ProblemError(Problem.INVALID_REQUEST, str(error), errors) from error
    return Body(content, {})


def field_there(field: str, fields_there: Mapping[str, str]) -> str:
    """Return the path that a field of a request has in the body, which is another path in a recipe of mergekit.

    It has no index into filters, because those of the translation come from several mappings.
    """
    known = max((ours for ours in fields_there if field == ours or field.startswith(f"{ours}.")), key=len, default=None)
    if known is None:
        return field
    rest = field.removeprefix(known)
    return fields_there[known] + (rest if rest.removeprefix(".").isdecimal() else "")


def field_of(location: Sequence[object]) -> str:
    """Return a field's path, as `models.0.checkpoint`, without the word body and the tags that unions add to it."""
    parts = [str(part) for part in location[1:] if not str(part).startswith(("constrained-", "literal[", "<"))]
    if len(parts) > 1 and parts[0] == "method":
        parts.pop(1)
    if len(parts) > 3 and parts[:2] == ["method", "candidates"]:
        parts.pop(3)
    if parts[:1] == ["method"] and "start" in parts[:-1]:
        parts.pop(parts.index("start") + 1)
    return ".".join(parts)
