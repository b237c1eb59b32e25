"""Numeric parameters that may differ between layers and tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from worker.engine.catalog.primitives.strict import Strict

Number = TypeVar("Number", bound=float)

EVERY_NAME = "*"
DEFAULT_WEIGHT = 1.0  # a model's weight for tensors that none of its filters matches


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's place in its model. `depth` is 0 at the first layer and before it, 1 at the last and after it."""

    name: str
    depth: float
    layer: int | None = None
    """Number of the layer; None outside the layers."""
    layers: int = 0
    """Number of layers in the list that has the layer."""


Where = (
    Literal["layers", "before", "after"]
    | tuple[Annotated[int, Field(ge=0, le=100_000)], Annotated[int, Field(ge=0, le=100_000)]]
)


def _form(setting: object) -> str | None:
    """Return the form that a setting has, so that errors are about that form alone; None if it has no known form."""
    if not isinstance(setting, list | tuple):
        return "<number>" if _spells_a_number(setting) else None
    filters = [isinstance(entry, dict | Filtered) for entry in setting]
    if not any(filters):
        return "<layers>"
    return "<filters>" if all(filters) else None


def _spells_a_number(setting: object) -> bool:
    if _is_misread(setting):
        return False
    if not isinstance(setting, str):
        return isinstance(setting, int | float)
    try:
        float(setting)  # YAML takes 1e-3, for example, for a text
    except ValueError:
        return False
    return True


def _is_misread(setting: object) -> bool:
    """Return whether Python takes it for a number, but writers of JSON or YAML do not: true, yes, 1_0."""
    return isinstance(setting, bool) or (isinstance(setting, str) and "_" in setting)


def _plain(number: Any) -> Any:
    if _is_misread(number):
        raise PydanticCustomError("not_a_number", "give a number")
    return number


PLAIN = BeforeValidator(_plain)

NumberOrLayers = Annotated[
    Union[  # noqa: UP007 - mypy takes no type variable on the left of |
        Annotated[Number, Tag("<number>")],
        Annotated[list[Annotated[Number, PLAIN]], Field(min_length=1, max_length=1000), Tag("<layers>")],
    ],
    Discriminator(
        _form,
        custom_error_type="not_per_layer",
        custom_error_message="give a number, or a list of numbers from the first layer to the last",
    ),
]


class Filtered(Strict, Generic[Number]):
    """The value of the tensors whose names match a glob."""

    model_config = ConfigDict(title="Filtered")

    filter: Annotated[str, Field(min_length=1, max_length=1000)]
    """Glob for names of tensors, such as `*.attention.*`; `*` alone matches every name."""
    value: NumberOrLayers[Number]
    """Value of these tensors: a number, or a list of numbers that runs over their layers."""
    where: Where | None = None
    """Restricts the value to tensors of layers; to these layers: the first, and the one after the last, counted from 0;
    or to tensors before or after all layers. A list of numbers then runs from the first of these layers to the last; a
    single layer has the last number. Null: any tensor."""

    @model_serializer(mode="wrap")
    def _without_null(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "where" or value is not None}

    def covers(self, place: TensorPlace) -> bool:
        """Return whether the value applies at the tensor's place, whatever its name."""
        if self.where is None:
            return True
        if self.where in ("before", "after"):
            return place.layer is None and (place.depth == 0) == (self.where == "before")
        if place.layer is None or isinstance(self.where, str):
            return place.layer is not None
        return self.where[0] <= place.layer < self.where[1]

    def at(self, place: TensorPlace) -> float:
        """Return the value at the place of a tensor that the entry covers."""
        if not isinstance(self.value, list):
            return self.value
        if self.where is None or place.layer is None:
            return _interpolated(self.value, place.depth)
        first, end = (0, place.layers) if isinstance(self.where, str) else self.where
        return _interpolated(self.value, 1.0 if end - first == 1 else (place.layer - first) / (end - first - 1))


class _FiltersInPlace:
    """Writes filters in place in JSON Schema. References would be named after all constraints of their number."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        filters = schema["oneOf"][-1]
        filters["items"] = handler.resolve_ref_schema(filters["items"])
        return schema


if TYPE_CHECKING:
    PerTensor = Union[Number, list[Number], list[Filtered[Number]]]  # noqa: UP007
else:

    class PerTensor:
        """A class, because an alias does not pass its number on to a generic model."""

        def __class_getitem__(cls, number: Any) -> Any:
            return Annotated[
                Annotated[number, Tag("<number>")]
                | Annotated[list[Annotated[number, PLAIN]], Field(min_length=1, max_length=1000), Tag("<layers>")]
                | Annotated[list[Filtered[number]], Field(min_length=1, max_length=1000), Tag("<filters>")],
                Discriminator(
                    _form,
                    custom_error_type="not_per_tensor",
                    custom_error_message="give a number, a list of numbers from the first layer to the last, or a list "
                    'of {"filter": glob, "value": number or list}',
                ),
                _FiltersInPlace(),
            ]


"""One value; values at equal distances from the first layer to the last, between which it is interpolated; or the
value of the first filter that matches. A tensor that no filter matches has the parameter's default."""

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


def value_at(
    setting: PerTensor[float],
    place: TensorPlace,
    default: float,
    matches: Callable[[str, str], bool] = fnmatchcase,
) -> float:
    """Return the value of a `PerTensor` parameter for one tensor."""
    if not isinstance(setting, list):
        return setting
    numbers = [value for value in setting if not isinstance(value, Filtered)]
    if len(numbers) == len(setting):
        return _interpolated(numbers, place.depth)
    for entry in filters_of(setting):
        if entry.covers(place) and matches(place.name, entry.filter):
            return entry.at(place)
    return default


def values_at(settings: Iterable[PerTensor[float]], place: TensorPlace, default: float) -> list[float]:
    """Return `value_at` of several parameters; a filter that several of them have is matched once."""
    matches = cache(fnmatchcase)
    return [value_at(setting, place, default, matches) for setting in settings]


def filters_of(setting: Any) -> list[Filtered[float]]:
    """Return the filters of a value in order; none if it is no `PerTensor` parameter with filters."""
    return [entry for entry in setting if isinstance(entry, Filtered)] if isinstance(setting, list) else []


def values_of(setting: PerTensor[float], default: float) -> Iterator[float]:
    """Yield every number in a `PerTensor` parameter, and the default where a tensor may have it."""
    filters = filters_of(setting)
    for given in setting if isinstance(setting, list) else [setting]:
        value = given.value if isinstance(given, Filtered) else given
        yield from value if isinstance(value, list) else [value]
    if filters and all(entry.filter != EVERY_NAME or entry.where is not None for entry in filters):
        yield default


def takes_part(weight: PerTensor[float]) -> bool:
    """Return whether a model with this weight takes part in the merge of any tensor."""
    return any(value != 0 for value in values_of(weight, DEFAULT_WEIGHT))


def is_ever_negative(weight: PerTensor[float]) -> bool:
    return any(value < 0 for value in values_of(weight, DEFAULT_WEIGHT))


def _interpolated(values: Sequence[float], depth: float) -> float:
    """Interpolate linearly between values at depths 0, 1/(n-1), …, 1."""
    at = depth * (len(values) - 1)
    index = min(int(at), len(values) - 2)
    if index < 0:
        return values[0]
    return values[index] + (at - index) * (values[index + 1] - values[index])
