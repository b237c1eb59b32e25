"""`slerp`, see its catalog entry."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, SlerpParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import combination
from worker.engine.merging.methods.inner_products import inner_products

COLINEAR = 1e-4  # sine of the angle; between opposites, rounding grows by its inverse


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, SlerpParameters):
        raise TypeError(f"parameters of slerp expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        products = inner_products(versions, lambda block: block.versions)
        coefficients = spherical(products, parameters.at("t", versions.place))

        def merge(block: Block) -> Tensor:
            return combination(block.versions, coefficients)

        return merge

    return prepare


def spherical(products: Tensor, t: float) -> Tensor:
    """Compute the factors of two vectors whose sum is `t` of the way along the arc between them.

    The straight line takes the place of the arc between opposites, between vectors that hardly differ in direction, and
    where a vector is zero. At both ends the result is that vector alone, without rounding.

    Args:
        products: inner products of the vectors, (2, 2, …), float64.

    Returns:
        The two factors, (2, …), float64.
    """
    cosine = (products[0, 1] / (products[0, 0] * products[1, 1]).sqrt()).clamp(-1, 1)
    sine = (1 - cosine**2).sqrt()
    angle = cosine.acos()
    on_arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / sine
    straight = torch.tensor([1 - t, t], dtype=torch.float64).view(2, *(1 for _ in sine.shape)).expand_as(on_arc)
    return straight if t in (0, 1) else torch.where(sine >= COLINEAR, on_arc, straight)
