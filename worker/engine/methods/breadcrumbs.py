"""`breadcrumbs` and `breadcrumbs_ties`, see their catalog entries."""

import math

from torch import Tensor

from worker.engine.catalog.methods import MaskingParameters, MethodParameters
from worker.engine.methods.blocks import Block, MeasuredModel, Merger, Versions
from worker.engine.methods.selection import kept_elements, nth_largest
from worker.engine.methods.task_vectors import Deltas, magnitudes, merging
from worker.engine.methods.ties import trim


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskingParameters):
        raise TypeError(f"parameters of breadcrumbs expected, got {type(parameters).__name__}")

    def sparse(versions: Versions) -> Deltas:
        density = parameters.at("density", versions.place)
        gamma = parameters.at("gamma", versions.place)
        elements, kept = math.prod(versions.shape), kept_elements(density, versions.shape)
        outliers = max(0, min(round(gamma * elements), elements - kept))
        ranks = [outliers + kept] * len(models) + [outliers + 1] * len(models)
        ends = nth_largest(versions, lambda block: magnitudes(block) * 2, ranks)
        lower, upper = ends[: len(models)], ends[len(models) :]

        def masked(block: Block) -> list[Tensor]:
            deltas = block.deltas
            for index, (delta, most) in enumerate(zip(deltas, upper, strict=True)):
                inliers = delta.clamp(-most, most).eq_(delta) if outliers else None
                deltas[index] = trim(delta if inliers is None else delta.mul_(inliers), lower[index])
            return deltas

        return masked

    return merging(parameters, models, sparse)
