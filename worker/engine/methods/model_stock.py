"""`model_stock`, see its catalog entry."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.methods.combine import combine
from worker.engine.methods.inner_products import inner_products


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    even = torch.full((len(models),), 1 / len(models), dtype=torch.float64)

    def prepare(versions: Versions) -> BlockMerge:
        t = ratio(inner_products(versions, lambda block: block.deltas))

        def merge(block: Block) -> Tensor:
            return torch.lerp(required_base(block.base), combine(block.versions, even), t)

        return merge

    return prepare


def ratio(products: Tensor) -> float:
    """`N c / (1 + (N - 1) c)`, c being the mean cosine of the pairs, 0 where it is negative.

    The paper derives it for vectors that are at most orthogonal. Beyond, it would go from the base away from the
    models, and past every bound where the denominator is 0.

    Args:
        products: of the task vectors, (N, N). One that is zero is orthogonal to all others.
    """
    count = len(products)
    norms = products.diagonal().sqrt()
    cosines = (products / (norms[:, None] * norms)).nan_to_num(0.0)
    cosine = float(cosines[tuple(torch.triu_indices(count, count, 1))].mean().clamp(0, 1))
    return count * cosine / (1 + (count - 1) * cosine)
