"""`karcher`, see its catalog entry.

The mean lies in the span of the models, and angles follow from inner products. So the whole iteration computes with the
coefficients of the models, and does not read the tensors again.
"""

import torch
from torch import Tensor

from worker.engine.catalog.methods import KarcherParameters, MethodParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import combination, model_weights
from worker.engine.merging.methods.inner_products import inner_products

NO_DIRECTION = 1e-6  # length of a mean of unit vectors; there rounding decides where it points
COLINEAR = 1e-7  # sine of an angle; there rounding decides which way is the shorter


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, KarcherParameters):
        raise TypeError(f"parameters of karcher expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        products = inner_products(versions, lambda block: block.versions)
        weights = model_weights(models, versions.place)
        coefficients = mean_coefficients(products, weights / weights.sum(), parameters.max_iter, parameters.tol)

        def merge(block: Block) -> Tensor:
            return combination(block.versions, coefficients)

        return merge

    return prepare


def mean_coefficients(products: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """Compute the coefficients of the mean; they are the weights where the directions have no mean.

    A zero vector has no direction, and only influences the length.

    Args:
        products: inner products of the vectors, (vectors, vectors), float64.
        weights: (vectors,), float64, summing to 1.

    Returns:
        Coefficients of the vectors, (vectors,), float64.
    """
    lengths = products.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    cosines = products * inverse * inverse[:, None]
    shares = weights * (lengths > 0)
    mean = shares / shares.sum()
    length = _length(mean, cosines)
    if not length > NO_DIRECTION:
        return weights
    shares, mean = mean, mean / length
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle, sine = cosine.acos(), (1 - cosine**2).sqrt()
        # This is the logarithm of each vector at the mean; for an opposite vector, every way is equally short.
        pull = shares * torch.where(sine > COLINEAR, angle / sine, (cosine > 0).double())
        step = pull - (pull * cosine).sum() * mean
        size = _length(step, cosines)
        if not size >= tol:
            break
        mean = mean * torch.cos(size) + step * (torch.sin(size) / size)
        mean = mean / _length(mean, cosines)
    return (weights * lengths).sum() * mean * inverse


def _length(coefficients: Tensor, cosines: Tensor) -> Tensor:
    return (coefficients @ cosines @ coefficients).clamp_min(0).sqrt()
