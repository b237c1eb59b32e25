"""`model_stock`, see its catalog entry."""

from itertools import combinations

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, ModelStockParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.combine import combine
from worker.engine.merging.methods.inner_products import inner_products, products_along


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, ModelStockParameters):
        raise TypeError(f"parameters of model_stock expected, got {type(parameters).__name__}")
    even = torch.full((len(models),), 1 / len(models), dtype=torch.float64)

    def merged(block: Block, t: Tensor) -> Tensor:
        base = required_base(block.base)
        return torch.lerp(base, combine(block.versions, even), t.to(base.dtype))

    def by_rows(block: Block) -> Tensor:
        t = ratio(products_along([delta.flatten(1) for delta in block.deltas], 1))
        return merged(block, t.view(-1, *(1 for _ in block.versions[0].shape[1:])))

    def prepare(versions: Versions) -> BlockMerge:
        if parameters.filter_wise and len(versions.shape) > 1:
            return by_rows
        t = ratio(inner_products(versions, lambda block: block.deltas))
        return lambda block: merged(block, t)

    return prepare


def ratio(products: Tensor) -> Tensor:
    """Compute `N c / (1 + (N - 1) c)`, where c is the mean cosine of the pairs, or 0 where that is negative.

    The paper derives it for vectors that are at most orthogonal. For others it would lead from the base away from the
    models, and without bound where the denominator is 0.

    Args:
        products: inner products of the task vectors, (N, N, …). A zero vector is orthogonal to all others.
    """
    count = len(products)
    pairs = [products[j, k] / (products[j, j] * products[k, k]).sqrt() for j, k in combinations(range(count), 2)]
    cosine = torch.stack(pairs).nan_to_num(0.0).mean(0).clamp(0, 1)
    return count * cosine / (1 + (count - 1) * cosine)
