"""Merges task vectors, sparse or not: as a sum, or after the election of a sign for every parameter."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.engine.catalog.methods import ElectionParameters, TaskVectorParameters
from worker.engine.catalog.methods.parameters import LEAST_SUM, cancels
from worker.engine.merging.methods.blocks import (
    CHUNK_ELEMENTS,
    Block,
    BlockMerge,
    MeasuredModel,
    Merger,
    Versions,
    required_base,
)
from worker.engine.merging.methods.combine import model_weights

Deltas = Callable[[Block], list[Tensor]]
"""Returns the task vectors of a block, which the caller may change."""


def merging(
    parameters: TaskVectorParameters, models: Sequence[MeasuredModel], sparse: Callable[[Versions], Deltas]
) -> Merger:
    """Make the method that merges the task vectors that `sparse` returns."""

    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place).tolist()
        deltas = sparse(versions)

        def merge(block: Block) -> Tensor:
            if isinstance(parameters, ElectionParameters):
                merged = elected_sum(deltas(block), weights, weights, normalize=parameters.normalize)
            else:
                merged = weighted_sum(deltas(block), weights)
                if parameters.normalize and not cancels(weights):
                    merged.div_(sum(weights))
            return merged.add_(required_base(block.base))

        return merge

    return prepare


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Compute the weighted sum as a new tensor."""
    first, *others = deltas
    weight, *weights = weights
    is_one = weight == 1 and bool(others)  # this saves a pass
    total = torch.add(first, others.pop(0), alpha=weights.pop(0)) if is_one else first * weight
    for delta, weight in zip(others, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def elected_sum(
    deltas: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float], *, normalize: bool
) -> Tensor:
    """Compute `sum_(j in A) w_j t_j`, where `A` are the models with the sign of `sum_k v_k t_k`; 0 where that is 0.

    So no model is preferred for its place in the list.

    Args:
        deltas: `t`, which are overwritten. A vector of negative weight and vote counts as its opposite.
        weights: `w`.
        votes: `v`, each with the sign of its weight.
        normalize: whether to divide by `sum_(j in A) w_j`.
    """
    merged = torch.empty_like(deltas[0])
    if min(weights) < 0:
        return _signed_sum(deltas, weights, votes, normalize=normalize)
    size = (
        2.0 ** (math.frexp(max(weights))[1] - 1) if normalize and any(weights) else 1.0
    )  # a power of 2 changes no digit
    shares = [weight / size for weight in weights]
    for part, *parts in zip(*(torch.split(t.view(-1), CHUNK_ELEMENTS) for t in (merged, *deltas)), strict=True):
        elected = weighted_sum(parts, votes).sign_()
        for delta in parts:
            delta.mul_(elected).clamp_min_(0)
        torch.mul(weighted_sum(parts, shares), elected, out=part)
        if normalize:
            total = weighted_sum([delta.sign_() for delta in parts], shares)
            part.div_(total.clamp_min_(torch.finfo(total.dtype).tiny))
    return merged


def _signed_sum(
    deltas: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float], *, normalize: bool
) -> Tensor:
    """Compute `elected_sum` for weights that may be below 0: the sign of `w_j t_j` is compared."""
    elected = weighted_sum(deltas, votes).sign_()
    merged, total = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() * math.copysign(1.0, weight) == elected).to(delta.dtype).mul_(elected.abs())
        merged.add_(delta.mul_(agrees), alpha=weight)
        total.add_(agrees, alpha=weight)
    return merged.div_(total.masked_fill_(total.abs() < LEAST_SUM, 1.0)) if normalize else merged


def magnitudes(block: Block) -> list[Tensor]:
    """Compute the magnitudes of the task vectors."""
    return [delta.abs_() for delta in block.deltas]
