"""Routes that take JSON also take YAML: our own requests, or recipes of mergekit."""

from fastapi import Request

from app.api.strict_route import YAML, StrictRoute

EXAMPLE = """merge_method: linear
models:
  - model: local:experts/topics
    parameters: {weight: 0.6}
  - model: local:experts/sentiment
    parameters: {weight: 0.4}
"""
YAML_BODY = {
    "requestBody": {
        "content": {
            "application/yaml": {
                "schema": {"type": "object", "description": "The same, or mergekit's."},
                "examples": {"a recipe of mergekit": {"value": EXAMPLE}},
            }
        }
    }
}


class YamlRoute(StrictRoute):
    """A route whose body may also be YAML."""

    media_types = (*StrictRoute.media_types, *YAML)


def as_sent(request: Request, field: str) -> str:
    """Return the path that a field of the request has in the body, which is another path in a recipe of mergekit.

    It has no index into filters, because those of the translation come from several mappings.
    """
    fields: dict[str, str] = getattr(request.state, "fields_there", {})
    known = max((ours for ours in fields if field == ours or field.startswith(f"{ours}.")), key=len, default=None)
    if known is None:
        return field
    rest = field.removeprefix(known)
    return fields[known] + (rest if rest.removeprefix(".").isdecimal() else "")
