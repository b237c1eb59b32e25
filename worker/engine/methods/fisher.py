"""`fisher`, see its catalog entry.

The authors' code divides each model's Fisher information by its L2 norm and keeps that of the first model, which it
favours, above 1e-6 before the division. Here no model is favoured and the floor is relative: information has the
scale of the model's confidence, and 1e-6 of the norm would be more than nearly all of a real model's parameters have.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import FisherParameters, MethodParameters
from worker.engine.methods.combine import (
    MeasuredModel,
    Merger,
    chunks,
    combine,
    merged_dtype,
    model_weights,
    normalized,
)


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, FisherParameters):
        raise TypeError(f"parameters of fisher expected, got {type(parameters).__name__}")
    lambdas = model_weights(models)
    norms, means = zip(*(_norm_and_mean(model) for model in models), strict=True)
    scales = [1 / norm if parameters.normalize and norm > 0 else 1.0 for norm in norms]
    # One floor for all: where no model has information, none has more of a say than its lambda gives it.
    floor = parameters.floor * sum(scale * mean for scale, mean in zip(scales, means, strict=True)) / len(models)

    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        flat = [version.to(merged_dtype(versions)).flatten() for version in versions]
        information = [model.fisher[slot.name].flatten() for model in models]
        merged = torch.empty_like(flat[0])
        for chunk in chunks(len(merged)):
            weights = torch.stack(
                [
                    lam * (scale * f[chunk].double()).clamp_min(floor)
                    for lam, scale, f in zip(lambdas, scales, information, strict=True)
                ]
            )
            merged[chunk] = combine([version[chunk] for version in flat], normalized(weights, lambdas))
        return merged.view_as(versions[0])

    return merge


def _norm_and_mean(model: MeasuredModel) -> tuple[float, float]:
    """The L2 norm and the mean of a model's Fisher information over all merged parameters."""
    squares = total = 0.0
    count = 0
    for information in model.fisher.values():
        squares += float(torch.linalg.vector_norm(information, dtype=torch.float64)) ** 2
        total += float(information.sum(dtype=torch.float64))
        count += information.numel()
    return squares**0.5, total / count
