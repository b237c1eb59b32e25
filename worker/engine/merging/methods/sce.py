"""`sce`, see its catalog entry."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, SceParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.inner_products import inner_products
from worker.engine.merging.methods.selection import kept_elements, nth_largest
from worker.engine.merging.methods.task_vectors import elected_sum


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, SceParameters):
        raise TypeError(f"parameters of sce expected, got {type(parameters).__name__}")
    even = [1.0] * len(models)

    def prepare(versions: Versions) -> BlockMerge:
        share = parameters.at("select_topk", versions.place)
        least = 0.0
        if share < 1:
            [least] = nth_largest(versions, lambda b: [variance(b.deltas)], [kept_elements(share, versions.shape)])

        def selected(block: Block) -> list[Tensor]:
            deltas = block.deltas
            if least > 0:
                varies = (variance(deltas) >= least).to(deltas[0].dtype)
                for delta in deltas:
                    delta.mul_(varies)
            return deltas

        squares = inner_products(versions, selected).diagonal()
        total = squares.sum()
        weights = (squares / total).tolist() if total != 0 else even

        def merge(block: Block) -> Tensor:
            return elected_sum(selected(block), weights, even, normalize=True).add_(required_base(block.base))

        return merge

    return prepare


def variance(deltas: list[Tensor]) -> Tensor:
    """Compute the variance of every element over the models, not corrected for their number."""
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean.add_(delta, alpha=1 / len(deltas))
    squares = torch.zeros_like(mean)
    for delta in deltas:
        squares.add_((delta - mean).square_())
    return squares.div_(len(deltas))
