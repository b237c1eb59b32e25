"""Models of requests: what JSON Schema says of their fields."""

from typing import Annotated, Generic, TypeVar

from pydantic import Field

from worker.engine.catalog.primitives.strict import Strict

Number = TypeVar("Number", bound=float)


class Bounded(Strict, Generic[Number]):
    most: Number
    """At the most."""


class Parent(Strict):
    own: int = 1
    """Of the parent,
    on two lines."""
    both: int = 2
    """Of the parent."""
    silent: int = 3
    given: Annotated[int, Field(description="As given.")] = 4


class Child(Parent):
    both: int = 5
    """Of the child."""
    bounded: Bounded[float]
    """A reference."""


def test_fields_are_described_by_the_texts_below_them() -> None:
    schema = Child.model_json_schema()
    described = {name: field.get("description") for name, field in schema["properties"].items()}
    assert described == {
        "own": "Of the parent,\non two lines.",
        "both": "Of the child.",
        "silent": None,
        "given": "As given.",
        "bounded": "A reference.",
    }
    assert schema["$defs"]["Bounded_float_"]["properties"]["most"]["description"] == "At the most."
