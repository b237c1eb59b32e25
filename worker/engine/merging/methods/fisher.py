"""`fisher`, see its catalog entry.

The authors' code divides each model's Fisher information by its L2 norm and keeps that of the first model, which it
favours, above 1e-6 before the division. Here no model is favoured and the floor is relative: information has the
scale of the model's confidence, and 1e-6 of the norm would be more than nearly all of a real model's parameters have.
"""

import torch
from torch import Tensor

from worker.engine.catalog.families import Kind
from worker.engine.catalog.methods import FisherParameters, MethodParameters
from worker.engine.checkpoints.row_blocks import row_blocks
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_slices, combine, model_weights, normalized


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, FisherParameters):
        raise TypeError(f"parameters of fisher expected, got {type(parameters).__name__}")
    norms, means = zip(*(_norm_and_mean(model) for model in models), strict=True)
    scales = [1 / norm if parameters.normalize and norm > 0 else 1.0 for norm in norms]
    mean_information = sum(scale * mean for scale, mean in zip(scales, means, strict=True)) / len(models)

    def prepare(versions: Versions) -> BlockMerge:
        lambdas = model_weights(models, versions.place)
        if versions.slot.kind is Kind.HEAD:  # merged heads are averaged, because they are not measured
            return by_slices(versions, (lambdas / lambdas.sum())[:, None])
        # All models have the same floor: where none has information, each has the share that its lambda gives it.
        floor = parameters.at("floor", versions.place) * mean_information
        information = [model.fisher[versions.slot.name] for model in models]

        def merge(block: Block) -> Tensor:
            weights = torch.stack(
                [
                    lam * (scale * f[block.rows].double()).clamp_min(floor).flatten()
                    for lam, scale, f in zip(lambdas, scales, information, strict=True)
                ]
            )
            return combine(block.versions, normalized(weights, lambdas).view(len(models), *block.versions[0].shape))

        return merge

    return prepare


def _norm_and_mean(model: MeasuredModel) -> tuple[float, float]:
    """Compute the L2 norm and the mean of a model's Fisher information over all merged parameters."""
    squares = total = 0.0
    count = 0
    for information in model.fisher.values():
        for rows in row_blocks(information.shape):
            part = information[rows]
            squares += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
            total += float(part.sum(dtype=torch.float64))
            count += part.numel()
    return squares**0.5, total / count
