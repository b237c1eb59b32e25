"""All methods that merge, in the order in which they are listed, and all statistics that they need."""

import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from worker.engine.catalog.methods import parameters
from worker.engine.catalog.methods.entry import MethodEntry
from worker.engine.catalog.methods.parameters import MethodParameters
from worker.engine.catalog.methods.refitting import RefittingParameters
from worker.engine.catalog.methods.statistic import Statistic
from worker.engine.catalog.primitives.strict import did_you_mean

NO_METHODS = ("auto", "entry", "merging", "parameters", "statistic")
"""Modules of this package that have no merging method."""
LISTED_FIRST = (
    "average", "mask_fisher", "task_arithmetic", "ties", "fisher", "regmean", "mask_regmean", "aligned_regmean",
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "dare_linear", "dare_ties", "della", "della_linear",
    "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion",
    "passthrough",
)  # fmt: skip
"""Names of the methods that come first in lists; others follow in alphabetical order."""


def _modules() -> Iterator[ModuleType]:
    """Yield the modules beside this one that have methods: a new one takes a file here, and one for its arithmetic."""
    folder = Path(__file__).parent
    for name in sorted(module.name for module in pkgutil.iter_modules([str(folder)])):
        if name not in NO_METHODS:
            yield import_module(f"{__package__}.{name}")


def _entries() -> Iterator[MethodEntry[MethodParameters]]:
    """Yield the entries that these modules define themselves."""
    for module in _modules():
        found = [value for value in vars(module).values() if isinstance(value, MethodEntry)]
        yield from (entry for entry in found if entry.parameters.__module__ == module.__name__)


def _by_name(entries: Iterable[MethodEntry[MethodParameters]]) -> dict[str, MethodEntry[MethodParameters]]:
    """Return entries by name, in the order of lists. Raises ImportError where two have the same name."""
    methods: dict[str, MethodEntry[MethodParameters]] = {}
    for entry in entries:
        if entry.name in methods:
            raise ImportError(f"two methods are called {entry.name}")
        methods[entry.name] = entry
    order = [*LISTED_FIRST, *sorted(methods.keys() - set(LISTED_FIRST))]
    return {name: methods[name] for name in order}


def _statistics() -> list[Statistic]:
    """Return the statistics that methods' modules define, in alphabetical order.

    Raises:
        ImportError: two have the same name.
    """
    named = {
        id(value): value
        for module in (parameters, *_modules())
        for value in vars(module).values()
        if isinstance(value, Statistic)
    }
    found = sorted(named.values())
    if len(set(found)) < len(found):
        raise ImportError(f"two statistics have the same name: {', '.join(found)}")
    return found


METHODS = _by_name(_entries())
STATISTICS = _statistics()
STARTS = tuple(
    name
    for name, entry in METHODS.items()
    if name != "passthrough"
    and not issubclass(entry.parameters, RefittingParameters)  # which cannot be made before starts are known
    and not entry.parameters.model_validate({"name": name}).refits_layers
)
"""Methods whose merge may be refitted."""


def _as_start(start: Any) -> Any:
    """Return a start as a recipe. Raises ValueError where it is none, or names no method to start from."""
    recipe = {"name": start} if isinstance(start, str) else start
    if not isinstance(recipe, dict | MethodParameters) or (isinstance(recipe, dict) and "name" not in recipe):
        raise ValueError('a start is a method\'s name, or an object that has it: "tsv_m" or {"name": "tsv_m"}')
    name = recipe.get("name") if isinstance(recipe, dict) else recipe.name
    if name in METHODS and name not in STARTS:
        raise ValueError(f"{name} cannot be a start, because it refits or stacks layers itself; name another method")
    return check_name(recipe, STARTS)


if TYPE_CHECKING:
    Method = MethodParameters
    StatisticName = str
else:
    StatisticName = Literal[tuple(map(str, STATISTICS))]
    _Starting = Annotated[
        Union[tuple(METHODS[name].parameters for name in STARTS)],  # noqa: UP007 - made of a tuple
        Field(discriminator="name"),
    ]
    StartingMethod = Annotated[
        _Starting, BeforeValidator(_as_start, json_schema_input_type=Literal[STARTS] | _Starting)
    ]
    for entry in METHODS.values():
        if issubclass(entry.parameters, RefittingParameters):
            entry.parameters.model_rebuild(_types_namespace={"StartingMethod": StartingMethod})
    Method = Annotated[
        Union[tuple(entry.parameters for entry in METHODS.values())],  # noqa: UP007 - made of a tuple
        Field(discriminator="name"),
    ]


def check_name(method: Any, known: Iterable[str] = METHODS) -> Any:
    """Return a method of a recipe unchanged. Raises PydanticCustomError where it names no known method."""
    name = method.get("name") if isinstance(method, dict) else None
    if isinstance(name, str) and name not in known:
        hint = did_you_mean(name, list(known))
        raise PydanticCustomError("unknown_method", "unknown method '{name}'{hint}", {"name": name, "hint": hint})
    return method
