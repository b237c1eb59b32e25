"""What the form of a new merge asks of a method, from the JSON Schema of its parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from worker.engine.catalog.methods import AUTO, METHODS

FIRST = ("mask_fisher", "average", "auto")
"""Methods that come first in the form: the project's own, the plainest, and the one that tries others."""


@dataclass(frozen=True)
class Parameter:
    name: str
    about: str
    default: str
    """Default as it is typed; empty where a request has to name a value, or null is the default."""
    choices: tuple[str, ...]
    """All values, if there are few."""
    bounds: str
    """Words for the range of numbers."""

    @property
    def field(self) -> str:
        """Name of its field in the form."""
        return f"method.{self.name}"


@dataclass(frozen=True)
class MethodForm:
    formula: str
    source: str
    needs: tuple[str, ...]
    parameters: tuple[Parameter, ...]


ENTRIES = {entry.name: entry for entry in (*METHODS.values(), AUTO)}
NAMES = (*FIRST, *sorted(ENTRIES.keys() - set(FIRST)))


@cache
def method_form(name: str) -> MethodForm:
    """Return what the form asks of a method. It is made once, since making a schema takes long."""
    described = ENTRIES[name].describe()
    parameters = described["parameters"]["properties"].items()
    return MethodForm(
        described["formula"],
        described["source"],
        tuple(described["needs"]),
        tuple(_parameter(own, of) for own, of in parameters if own != "name"),
    )


def _parameter(name: str, schema: Mapping[str, Any]) -> Parameter:
    default = schema.get("default")
    choices = schema.get("enum") or (("true", "false") if schema.get("type") == "boolean" else ())
    return Parameter(
        name,
        " ".join(str(schema.get("description", "")).split()),
        "" if default is None else default if isinstance(default, str) else json.dumps(default),
        tuple(map(str, choices)),
        _bounds(schema),
    )


def _bounds(schema: Mapping[str, Any]) -> str:
    """Return the range of numbers that a parameter takes, of the first of its types that has one."""
    for of in (schema, *schema.get("oneOf", ()), *schema.get("anyOf", ())):
        least = next((f"{w} {of[k]}" for k, w in (("minimum", "from"), ("exclusiveMinimum", "above")) if k in of), "")
        most = next((f"{w} {of[k]}" for k, w in (("maximum", "to"), ("exclusiveMaximum", "below")) if k in of), "")
        if least or most:
            return f"{least} {most}".strip()
    return ""
