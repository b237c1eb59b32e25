"""A pydantic model that refuses unknown fields, and says which one was probably meant."""

import ast
import inspect
from contextvars import ContextVar
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

LONGEST_NAME = 40  # characters of a quoted name: columns of a file without a header are its first row
MOST_NAMES = 20
IGNORE_UNKNOWN = {"ignore_unknown": True}
"""Context of a validation that passes over unknown fields, as that of answers from a service of another version."""
MOST_COMPARED = 1000  # names, each of which takes 0.1 ms; of more, the first ones

_comparisons: ContextVar[list[int] | None] = ContextVar("comparisons", default=None)  # left to all hints, if limited


def limit_hints() -> None:
    """Limit all hints of this context together to the comparisons of one: a request can cause thousands of hints."""
    _comparisons.set([MOST_COMPARED])


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, whatever its case, or else the list of known names."""
    if not known:
        return "; there are none"
    shown = [one if len(one) <= LONGEST_NAME else f"{one[:LONGEST_NAME]}…" for one in sorted(known)]
    left = _comparisons.get() or [MOST_COMPARED]
    compared = shown[: left[0]]
    left[0] -= len(compared)
    near = get_close_matches(name[:LONGEST_NAME], compared, n=1)
    if not near:
        by_lower = {one.lower(): one for one in compared}
        near = [by_lower[one] for one in get_close_matches(name[:LONGEST_NAME].lower(), list(by_lower), n=1)]
    if near:
        return f"; did you mean '{near[0]}'?"
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return f"; known are {', '.join(shown[:MOST_NAMES])}{more}"


def _refuse_conversions(schema: Any) -> None:
    """Make numbers and booleans strict. A model that is strict as a whole would refuse JSON's lists and constants."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float", "bool"):
            schema["strict"] = True
        for inner in schema.values():
            _refuse_conversions(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            _refuse_conversions(inner)


class Strict(BaseModel):
    """Refuses strings for numbers and booleans, and booleans for numbers: `"1_000"`, `true`, `"off"` may be slips."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _refuse_conversions(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, dict) and info.context is not IGNORE_UNKNOWN:
            known = cls.model_fields  # looked up once, because pydantic makes it anew each time
            for name in data:
                if name not in known:
                    raise PydanticCustomError(
                        "unknown_field",
                        "unknown field '{field}'{hint}",
                        {"field": str(name)[:LONGEST_NAME], "hint": did_you_mean(str(name), list(known))},
                    )
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe fields by their docstrings.

        `use_attribute_docstrings` would do so when a class is made, and take most of the time of importing the catalog.
        """
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for owner in reversed(cls.__mro__):
            if issubclass(owner, Strict):
                for name, text in _texts_below(owner).items():
                    if name in properties:
                        properties[name]["description"] = text
        return schema


@cache
def _texts_below(owner: type) -> dict[str, str]:
    """Return the docstrings of a class's attributes, by the name of the attribute."""
    try:
        [definition] = ast.parse(dedent(inspect.getsource(owner))).body
    except OSError:  # a generic class with its type has no source
        return {}
    texts = {}
    for attribute, text in pairwise(getattr(definition, "body", ())):
        match attribute, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(found))):
                texts[name] = inspect.cleandoc(found)
    return texts
