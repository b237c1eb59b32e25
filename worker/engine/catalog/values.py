"""Numeric parameters that may differ between layers and tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from worker.engine.catalog.strict import Strict

Number = TypeVar("Number", bound=float)

EVERY_NAME = "*"
DEFAULT_WEIGHT = 1.0  # of a model, for tensors that none of its filters names


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its model: `depth` is 0 at the first layer and before it, 1 at the last and after it."""

    name: str
    depth: float


def _form(setting: object) -> str | None:
    """Which form a setting has, so that what is wrong with it is told of that form alone; None: it has none."""
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
        float(setting)  # as 1e-3, which YAML takes for a text
    except ValueError:
        return False
    return True


def _is_misread(setting: object) -> bool:
    """Whether Python takes it for a number, but nobody who writes JSON or YAML does: true, yes, 1_0."""
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
    """As `*.attention.*`; `*` alone matches every name."""
    value: NumberOrLayers[Number]


class _FiltersInPlace:
    """In JSON Schema; by reference they would be named after all that is known of their number."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        filters = schema["oneOf"][-1]
        filters["items"] = handler.resolve_ref_schema(filters["items"])
        return schema


if TYPE_CHECKING:
    PerTensor = Union[Number, list[Number], list[Filtered[Number]]]  # noqa: UP007
else:

    class PerTensor:
        """As a class, since an alias does not pass its number on to a generic model."""

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
Weight = Annotated[float, Field(ge=0, le=1e6)]


def value_at(
    setting: PerTensor[float],
    place: Place,
    default: float,
    matches: Callable[[str, str], bool] = fnmatchcase,
) -> float:
    """The value of a `PerTensor` parameter for one tensor."""
    if not isinstance(setting, list):
        return setting
    numbers = [value for value in setting if not isinstance(value, Filtered)]
    if len(numbers) == len(setting):
        return _interpolated(numbers, place.depth)
    for entry in filters_of(setting):
        if matches(place.name, entry.filter):
            return _interpolated(entry.value, place.depth) if isinstance(entry.value, list) else entry.value
    return default


def values_at(settings: Iterable[PerTensor[float]], place: Place, default: float) -> list[float]:
    """`value_at` of several parameters; a filter that several of them have is matched once."""
    matches = cache(fnmatchcase)
    return [value_at(setting, place, default, matches) for setting in settings]


def filters_of(setting: Any) -> list[Filtered[float]]:
    """The filters of what may be a `PerTensor` parameter, in order."""
    return [entry for entry in setting if isinstance(entry, Filtered)] if isinstance(setting, list) else []


def values_of(setting: PerTensor[float], default: float) -> Iterator[float]:
    """Every number in a `PerTensor` parameter, and the default where a tensor may have it."""
    filters = filters_of(setting)
    for given in setting if isinstance(setting, list) else [setting]:
        value = given.value if isinstance(given, Filtered) else given
        yield from value if isinstance(value, list) else [value]
    if filters and all(entry.filter != EVERY_NAME for entry in filters):
        yield default


def is_ever_positive(weight: PerTensor[float]) -> bool:
    """Whether a model with this weight takes part in the merge of any tensor."""
    return any(value > 0 for value in values_of(weight, DEFAULT_WEIGHT))


def _interpolated(values: list[float], depth: float) -> float:
    """Linear between values at depths 0, 1/(n-1), …, 1."""
    at = depth * (len(values) - 1)
    index = min(int(at), len(values) - 2)
    if index < 0:
        return values[0]
    return values[index] + (at - index) * (values[index + 1] - values[index])
