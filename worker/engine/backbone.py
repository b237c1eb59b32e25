"""The merged backbone, one tensor at a time."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from worker.engine.catalog.errors import InvalidCheckpoint
from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import AverageParameters
from worker.engine.catalog.planning import MergePlan, PlannedTensor
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.methods import BUILDERS, MeasuredModel, Merger


class Backbone:
    """Merged backbone tensors, computed one at a time from lazily read inputs of the models that take part.

    Args:
        scale: s in `theta_0 + s (theta - theta_0)`, with theta_0 the base and theta what the method gives.
    """

    def __init__(self, plan: MergePlan, takes_part: Sequence[bool], merger: Merger, scale: float = 1.0) -> None:
        self._plan = plan
        self._taking_part = [index for index, takes in enumerate(takes_part) if takes]
        self._merger = merger
        self._scale = scale
        self._stack = ExitStack()
        self._readers: dict[int, TensorReader] = {}
        self._base: TensorReader | None = None

    def __enter__(self) -> "Backbone":
        for index in self._taking_part:
            self._readers[index] = self._stack.enter_context(TensorReader(self._plan.checkpoints[index]))
        if self._plan.base is not None:
            self._base = self._stack.enter_context(TensorReader(self._plan.base))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, planned: PlannedTensor) -> Tensor:
        versions = [self._readers[index].read(planned.sources[index]) for index in self._taking_part]
        base = self._base_of(planned)
        merged = self._merger(planned.slot, versions, base)
        if self._scale == 1:
            return merged
        if base is None:
            raise TypeError("scale needs a base")
        return base.to(merged.dtype) + self._scale * (merged - base.to(merged.dtype))

    def _base_of(self, planned: PlannedTensor) -> Tensor | None:
        """Raises InvalidCheckpoint where it has NaN or infinity; the models were checked when they were loaded."""
        if self._base is None or planned.base is None:
            return None
        base = self._base.read(planned.base)
        if self._plan.base is not None and not bool(torch.isfinite(base).all()):
            name = planned.base.name
            raise InvalidCheckpoint(
                self._plan.base.source, f"tensor {name} has values that are NaN or infinite", tensor=name
            )
        return base

    def state(self) -> dict[str, Tensor]:
        """All of it, to be loaded into a model."""
        return {tensor.slot.name: self.tensor(tensor) for tensor in self._plan.backbone}


def given(state: Mapping[str, Tensor]) -> Merger:
    """What is merged already, as a method: tensors by `Slot.name`."""

    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        return state[slot.name]

    return merge


def plain_average(plan: MergePlan, takes_part: Sequence[bool]) -> dict[str, Tensor]:
    """The unweighted average of the models that take part, to be loaded into a model."""
    equal = [MeasuredModel(1.0) for takes in takes_part if takes]
    without_base = replace(plan, base=None)  # an average does not read it
    with Backbone(without_base, takes_part, BUILDERS["average"](AverageParameters(), equal)) as backbone:
        return backbone.state()
