"""Convex combination of the versions of a tensor, slice by slice: what every weighted method ends in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from worker.engine.catalog.families import Slot

CHUNK = 1 << 18  # elements: float64 copies of whole embedding matrices, one per model, would take gigabytes


class Merger(Protocol):
    """A method over its models. `versions` is one tensor's, one per model in order; `base` is the ancestor's."""

    def __call__(self, slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class MeasuredModel:
    """A model as a method sees it: its weight lambda, and what was measured of it, where the method needs it.

    `grams` and `fisher` may be on disk and read when they are asked for.
    """

    weight: float
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Of mask nodes: (nodes,), float64, by score name."""
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean of `x x^T` over non-padding tokens, (inputs, inputs), float32, by `Slot.input`."""
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Of every parameter: float32, in the shape of its tensor, by `Slot.name`."""


def model_weights(models: Sequence[MeasuredModel]) -> Tensor:
    """The weights of the models, (models,), float64, as given."""
    return torch.tensor([model.weight for model in models], dtype=torch.float64)


def normalized(weights: Tensor, fallback: Tensor) -> Tensor:
    """`weights` (models, nodes) divided by their sum over models; where that is zero, `fallback` (models,) is."""
    total = weights.sum(0)
    fallback = (fallback / fallback.sum())[:, None].expand_as(weights)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), fallback)


def merged_dtype(versions: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where a version is float64."""
    return torch.float64 if any(v.dtype == torch.float64 for v in versions) else torch.float32


def chunks(count: int) -> Iterator[slice]:
    """Runs of elements that are small enough for float64 copies of every version."""
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK)


def required_base(base: Tensor | None) -> Tensor:
    if base is None:
        raise RuntimeError("the method needs a base; planning should have refused this")
    return base


def combine(versions: Sequence[Tensor], weights: Tensor, axis: int = 0) -> Tensor:
    """`theta_1 + sum_j w_j (theta_j - theta_1)`, exact for identical versions.

    Args:
        versions: one tensor per model, of the same shape.
        weights: (models, slices), float64, summing to 1 over models. The tensor's `axis` is cut into `slices` equal
            runs in order; one slice stands for the whole tensor.

    Returns:
        The merged tensor in float32, or float64 where a version is float64.
    """
    dtype = merged_dtype(versions)
    first = versions[0].to(dtype)
    merged = first.clone()
    for version, weight in zip(versions[1:], weights[1:].to(dtype), strict=True):
        if weight.numel() > 1:
            shape = [1] * first.dim()
            shape[axis] = first.shape[axis]
            weight = weight.repeat_interleave(first.shape[axis] // weight.numel()).view(shape)
        merged += weight * (version.to(dtype) - first)
    return merged
