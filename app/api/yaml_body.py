"""Routes that take JSON also take YAML: our own requests, or recipes of mergekit."""

from fastapi import Request

from app.api.strict_route import YAML, StrictRoute
from app.services.bodies import field_there

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
    """Return the path that a field of the request has in the body; see `field_there`."""
    fields: dict[str, str] = getattr(request.state, "fields_there", {})
    return field_there(field, fields)
