"""Reads bodies of requests: JSON or YAML, our own requests or recipes of mergekit."""

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
