"""`breadcrumbs` and `breadcrumbs_ties`, see their catalog entries."""

import math

from torch import Tensor

from worker.engine.catalog.methods import MaskingParameters, MethodParameters
from worker.engine.merging.methods.blocks import Block, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.selection import kept_elements, nth_largest
from worker.engine.merging.methods.task_vectors import Deltas, magnitudes, merging
from worker.engine.merging.methods.ties import trim


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskingParameters):
        raise TypeError(f"parameters of breadcrumbs expected, got {type(parameters).__name__}")
    of_models = [parameters.of_model(model.parameters) for model in models]

    def sparse(versions: Versions) -> Deltas:
        elements, place = math.prod(versions.shape), versions.place
        kept = [kept_elements(own.at("density", place), versions.shape) for own in of_models]
        dropped = [
            max(0, min(round(own.at("gamma", place) * elements), elements - count))
            for own, count in zip(of_models, kept, strict=True)
        ]
        last = [outliers + count for outliers, count in zip(dropped, kept, strict=True)]
        ends = nth_largest(versions, lambda block: magnitudes(block) * 2, [*last, *(n + 1 for n in dropped)])
        lower, upper = ends[: len(models)], ends[len(models) :]

        def masked(block: Block) -> list[Tensor]:
            deltas = block.deltas
            for index, (delta, most, outliers) in enumerate(zip(deltas, upper, dropped, strict=True)):
                inliers = delta.clamp(-most, most).eq_(delta) if outliers else None
                deltas[index] = trim(delta if inliers is None else delta.mul_(inliers), lower[index])
            return deltas

        return masked

    return merging(parameters, models, sparse)
