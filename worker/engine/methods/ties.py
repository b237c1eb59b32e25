"""`ties`, see its catalog entry.

As in the authors' code the mean is over the models that agree; with weights it is `sum lambda t / sum lambda` over
them, which for equal weights is the same. `scale` is the paper's lambda, applied by the caller.
"""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, TiesParameters
from worker.engine.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.methods.combine import model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, TiesParameters):
        raise TypeError(f"parameters of ties expected, got {type(parameters).__name__}")
    density = parameters.density

    def prepare(versions: Versions) -> BlockMerge:
        lambdas = model_weights(models, versions.place)[:, None]
        thresholds = [magnitude_threshold(delta.flatten(), density) for delta in versions.whole().deltas]

        def merge(block: Block) -> Tensor:
            trimmed = [delta * (delta.abs() >= least) for delta, least in zip(block.deltas, thresholds, strict=True)]
            base = required_base(block.base)
            mean = agreeing_mean(torch.stack(trimmed).flatten(1).double(), lambdas)
            return base + mean.view_as(base).to(base.dtype)

        return merge

    return prepare


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
