"""`task_arithmetic`, see its catalog entry. The caller applies its `scale`, as that of every method."""

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, TaskArithmeticParameters
from worker.engine.merging.methods.blocks import Block, MeasuredModel, Merger
from worker.engine.merging.methods.task_vectors import merging


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, TaskArithmeticParameters):
        raise TypeError(f"parameters of task_arithmetic expected, got {type(parameters).__name__}")
    return merging(parameters, models, lambda _: _deltas)


def _deltas(block: Block) -> list[Tensor]:
    return block.deltas
