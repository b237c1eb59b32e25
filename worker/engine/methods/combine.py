"""Convex combination of the versions of a tensor, slice by slice: what every weighted method ends in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.engine.catalog.families import Slot

Merger = Callable[[Slot, Sequence[Tensor]], Tensor]
"""From a tensor's place and its versions, one per model in order, to the merged tensor."""


@dataclass(frozen=True)
class ScoredModel:
    """A model as a method sees it: its weight lambda, and its scores, (nodes,) float64 by score name."""

    weight: float
    scores: Mapping[str, Tensor] = field(default_factory=dict)


def normalized(weights: Tensor, fallback: Tensor) -> Tensor:
    """`weights` (models, nodes) divided by their sum over models; where that is zero, `fallback` (models,) is."""
    total = weights.sum(0)
    fallback = (fallback / fallback.sum())[:, None].expand_as(weights)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), fallback)


def combine(versions: Sequence[Tensor], weights: Tensor, axis: int = 0) -> Tensor:
    """`theta_1 + sum_j w_j (theta_j - theta_1)`, exact for identical versions.

    Args:
        versions: one tensor per model, of the same shape.
        weights: (models, slices), float64, summing to 1 over models. The tensor's `axis` is cut into `slices` equal
            runs in order; one slice stands for the whole tensor.

    Returns:
        The merged tensor in float32, or float64 where a version is float64.
    """
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in versions) else torch.float32
    first = versions[0].to(dtype)
    merged = first.clone()
    for version, weight in zip(versions[1:], weights[1:].to(dtype), strict=True):
        if weight.numel() > 1:
            shape = [1] * first.dim()
            shape[axis] = first.shape[axis]
            weight = weight.repeat_interleave(first.shape[axis] // weight.numel()).view(shape)
        merged += weight * (version.to(dtype) - first)
    return merged
