"""`ties`, see its catalog entry.

As in the authors' code the mean is over the models that agree; with weights it is `sum lambda t / sum lambda` over
them, which for equal weights is the same. `scale` is the paper's lambda, applied by the caller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import MethodParameters, TiesParameters
from worker.engine.methods.combine import MeasuredModel, Merger, chunks, merged_dtype, model_weights, required_base


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, TiesParameters):
        raise TypeError(f"parameters of ties expected, got {type(parameters).__name__}")
    lambdas = model_weights(models)[:, None]
    density = parameters.density

    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        dtype = merged_dtype(versions)
        origin = required_base(base).to(dtype)
        flat = [version.to(dtype).flatten() for version in versions]
        merged = origin.flatten().clone()
        thresholds = torch.stack([magnitude_threshold(version - merged, density) for version in flat]).double()
        for chunk in chunks(merged.numel()):
            part = merged[chunk]  # a view: the merge replaces the base in it
            deltas = torch.stack([version[chunk] - part for version in flat]).double()
            part += agreeing_mean(deltas * (deltas.abs() >= thresholds[:, None]), lambdas).to(dtype)
        return merged.view_as(origin)

    return merge


def magnitude_threshold(delta: Tensor, density: float) -> Tensor:
    """The least magnitude that is kept of `delta` (elements,): of at least one element, and of all that equal it."""
    kept = max(1, round(density * delta.numel()))
    return delta.abs().kthvalue(delta.numel() - kept + 1).values


def agreeing_mean(trimmed: Tensor, lambdas: Tensor) -> Tensor:
    """The weighted mean of what has the sign of the weighted sum; 0 where the sum is 0, so no model is preferred.

    Args:
        trimmed: (models, elements), float64.
        lambdas: (models, 1), float64.
    """
    weighted = lambdas * trimmed
    elected = weighted.sum(0).sign()
    agrees = trimmed.sign() == elected
    total = (lambdas * agrees).sum(0)
    return (weighted * agrees).sum(0) / torch.where(total > 0, total, 1.0)
