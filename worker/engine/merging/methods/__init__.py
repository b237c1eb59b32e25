"""The arithmetic of every merge method: pure functions over the versions of one tensor.

A method is built once per merge by its `build` and then called for each backbone tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

from torch import Tensor

from worker.engine.catalog.methods import METHODS, MethodEntry, MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.refits.comparison import Expert
from worker.engine.runtime.device import Precision

Build = Callable[[MethodParameters, list[MeasuredModel]], Merger]
Refit = Callable[
    [MergePlan, Mapping[str, Tensor], Sequence[Expert], MethodParameters, Precision, Callable[[], None]],
    dict[str, Tensor],
]
"""Refits the layers of a merged backbone to the experts, and calls back after each group of layers."""


def _arithmetic(entry: MethodEntry[MethodParameters]) -> ModuleType:
    """Return the module here that has the name of the entry's module."""
    return import_module(f"{__name__}.{entry.parameters.__module__.rpartition('.')[2]}")


BUILDERS: Mapping[str, Build] = {name: _arithmetic(entry).build for name, entry in METHODS.items()}
"""Functions `build` of all methods' modules, by the method's name."""
REFITS: Mapping[str, Refit] = {
    name: refit for name, entry in METHODS.items() if (refit := getattr(_arithmetic(entry), "refit", None)) is not None
}
"""Functions `refit` of the methods whose `refits_layers` is true, by name; each refits the method's merge."""

__all__ = ["BUILDERS", "REFITS", "Build", "MeasuredModel", "Merger", "Refit"]
