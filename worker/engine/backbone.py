"""The merged backbone, one tensor at a time."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

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
        base = self._base.read(planned.base) if self._base and planned.base else None
        merged = self._merger(planned.slot, versions, base)
        if self._scale == 1:
            return merged
        if base is None:
            raise TypeError("scale needs a base")
        return base.to(merged.dtype) + self._scale * (merged - base.to(merged.dtype))

    def state(self) -> dict[str, Tensor]:
        """All of it, to be loaded into a model."""
        return {tensor.slot.name: self.tensor(tensor) for tensor in self._plan.backbone}


def plain_average(plan: MergePlan, takes_part: Sequence[bool]) -> dict[str, Tensor]:
    """The unweighted average of the models that take part, to be loaded into a model."""
    equal = [MeasuredModel(1.0) for takes in takes_part if takes]
    with Backbone(plan, takes_part, BUILDERS["average"](AverageParameters(), equal)) as backbone:
        return backbone.state()
