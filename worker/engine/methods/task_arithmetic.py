"""`task_arithmetic`, see its catalog entry. Its `scale` is applied as every method's is, by the caller."""

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    def merge(block: Block) -> Tensor:
        merged = required_base(block.base).clone()
        for model, delta in zip(models, block.deltas, strict=True):
            merged.add_(delta, alpha=model.weight)
        return merged

    def prepare(versions: Versions) -> BlockMerge:
        return merge

    return prepare
