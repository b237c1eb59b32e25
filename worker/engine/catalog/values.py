"""Numeric parameters that may differ between layers and tensors."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Generic, TypeVar, Union

from pydantic import Field

from worker.engine.catalog.strict import Strict

Number = TypeVar("Number", bound=float)


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its model: `depth` is 0 at the first layer and before it, 1 at the last and after it."""

    name: str
    depth: float


class Filtered(Strict, Generic[Number]):
    """The value of the tensors whose names match a glob."""

    filter: Annotated[str, Field(min_length=1, max_length=1000)]
    """As `*.attention.*`; `*` alone matches every name."""
    value: Number | Annotated[list[Number], Field(min_length=1, max_length=1000)]


PerTensor = Union[  # noqa: UP007 - mypy takes no type variable on the left of |
    Number,
    Annotated[list[Number], Field(min_length=1, max_length=1000)],
    Annotated[list[Filtered[Number]], Field(min_length=1, max_length=1000)],
]
"""One value; values at equal distances from the first layer to the last, between which it is interpolated; or the
value of the first filter that matches. A tensor that no filter matches has the parameter's default."""


def value_at(setting: float | list[float] | list[Filtered[float]], place: Place, default: float) -> float:
    """The value of a `PerTensor` parameter for one tensor."""
    if not isinstance(setting, list):
        return setting
    numbers = [value for value in setting if not isinstance(value, Filtered)]
    if len(numbers) == len(setting):
        return _interpolated(numbers, place.depth)
    for entry in setting:
        if isinstance(entry, Filtered) and fnmatchcase(place.name, entry.filter):
            return _interpolated(entry.value, place.depth) if isinstance(entry.value, list) else entry.value
    return default


def _interpolated(values: list[float], depth: float) -> float:
    """Linear between values at depths 0, 1/(n-1), …, 1."""
    at = depth * (len(values) - 1)
    index = min(int(at), len(values) - 2)
    if index < 0:
        return values[0]
    return values[index] + (at - index) * (values[index + 1] - values[index])
