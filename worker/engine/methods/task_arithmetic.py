"""`task_arithmetic`, see its catalog entry. Its `scale` is applied as every method's is, by the caller."""

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.methods.combine import model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place).tolist()

        def merge(block: Block) -> Tensor:
            merged = required_base(block.base).clone()
            for weight, delta in zip(weights, block.deltas, strict=True):
                merged.add_(delta, alpha=weight)
            return merged

        return merge

    return prepare
