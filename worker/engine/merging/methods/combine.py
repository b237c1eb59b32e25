"""Convex combination of the versions of a tensor, slice by slice, in which every weighted method ends."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from worker.engine.catalog.families import NodeKind, Owner, ScoreName
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, TensorPlace, values_at
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Versions

SUM_ROUNDING = 1e-12  # largest distance from 1 at which rounding may leave a sum of coefficients


def model_weights(models: Sequence[MeasuredModel], place: TensorPlace) -> Tensor:
    """Return the weights of the models for one tensor, (models,), float64, as given."""
    weights = values_at((model.weight for model in models), place, DEFAULT_WEIGHT)
    return torch.tensor(weights, dtype=torch.float64)


def normalized(weights: Tensor, fallback: Tensor) -> Tensor:
    """Divide `weights` (models, nodes) by their sum over models; where that is zero, take `fallback` (models,)."""
    total = weights.sum(0)
    fallback = (fallback / fallback.sum())[:, None].expand_as(weights)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), fallback)


def combine(versions: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Compute `theta_1 + sum_j w_j (theta_j - theta_1)`.

    The result is exact for identical versions and where one has all the weight.

    Args:
        versions: one tensor per model, of the same shape and dtype.
        weights: (models, …), summing to 1 over models; the axes after the first fit the versions' shape.
    """
    first = versions[0]
    weights = weights.to(first.dtype)
    merged = first.clone()
    for version, weight in zip(versions[1:], weights[1:], strict=True):
        if weight.numel() == 1:
            merged.add_(version - first, alpha=float(weight))
        else:
            merged.addcmul_(version - first, weight)
    alone = (weights == 1) & ((weights != 0).sum(0) == 1)
    for version, is_alone in zip(versions[1:], alone[1:], strict=True):
        if bool(is_alone.any()):
            merged = torch.where(is_alone, version, merged)
    return merged


def combination(versions: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Compute `sum_j c_j theta_j` as `combine` does, so that it is exact for identical versions and a sum of 1.

    Args:
        coefficients: like the weights of `combine`, except for their sum.
    """
    merged = combine(versions, coefficients)
    beyond = coefficients.sum(0) - 1
    beyond = torch.where(beyond.abs() < SUM_ROUNDING, 0.0, beyond).to(merged.dtype)
    return merged.addcmul_(versions[0], beyond) if bool(beyond.any()) else merged


def by_layer(scores: Mapping[ScoreName, Tensor]) -> dict[tuple[str, int, NodeKind], Tensor]:
    """Return the scores of all nodes of a kind in a layer, (…, nodes), by stack, layer and kind: those of experts one
    after another."""
    parts: dict[tuple[str, int, NodeKind], list[tuple[int, Tensor]]] = {}
    for name, of_nodes in scores.items():
        parts.setdefault((name.stack, name.layer, name.kind), []).append((name.expert or 0, of_nodes))
    return {key: torch.cat([part for _, part in sorted(of, key=itemgetter(0))], dim=-1) for key, of in parts.items()}


def of_slices(owner: Owner, parts: Sequence[Tensor]) -> Tensor:
    """Put the weights of nodes in the order in which the nodes' slices are in a tensor: (models, slices).

    Args:
        parts: weights of each part's nodes, (models, nodes).
    """
    if not owner.by_head:
        return torch.cat(list(parts), dim=1)
    groups = min(part.shape[1] for part in parts)
    return torch.cat([part.reshape(len(part), groups, -1) for part in parts], dim=2).flatten(1)


def by_slices(versions: Versions, weights: Tensor, axis: int = 0) -> BlockMerge:
    """Make `combine` with a weight for every slice.

    Args:
        weights: (models, slices), float64, summing to 1 over models. The tensor's `axis` is cut into `slices` equal
            runs in order; one slice stands for the whole tensor.
    """
    models, slices = weights.shape
    if slices == 1:
        return lambda block: combine(block.versions, weights)
    length = versions.shape[axis]
    shape = [models, *(1 for _ in versions.shape)]
    shape[axis + 1] = length
    spread = weights.repeat_interleave(length // slices, dim=1).view(shape)

    def merge(block: Block) -> Tensor:
        return combine(block.versions, spread[:, block.rows] if axis == 0 else spread)

    return merge
