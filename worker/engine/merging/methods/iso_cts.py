"""`iso_cts`, see its catalog entry.

As many directions are common as leave the same number to each model. As in `iso_c`, directions that the task vectors do
not have are not made up.
"""

import torch
from torch import Tensor

from worker.engine.catalog.methods import IsoCtsParameters, MethodParameters
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.methods.matrices import Components, TaskMatrices, merging_matrices

PROJECTION_ROUNDING = 1e-13  # share of a task vector that may be left where all of it lies in the common directions


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, IsoCtsParameters):
        raise TypeError(f"parameters of iso_cts expected, got {type(parameters).__name__}")

    def merged(matrices: TaskMatrices) -> Tensor:
        count = len(matrices)
        of_each = directions_of_each(min(matrices.base.shape), parameters.at("common", matrices.place), count)
        shared = min(matrices.base.shape) - count * of_each
        common = Components.of(matrices.sum(), shared, count * matrices.rounding)

        def own(index: int) -> Components:
            delta = matrices[index].mul_(matrices.weights[index])
            rounding = max(matrices.rounding, PROJECTION_ROUNDING * float(torch.linalg.vector_norm(delta)))
            return Components.of(delta.sub_(common.left @ (common.left.T @ delta)), of_each, rounding)

        return matrices.base.double() + Components.joined([*map(own, range(count)), common]).isotropic().matrix()

    return merging_matrices(models, merged)


def directions_of_each(directions: int, common: float, models: int) -> int:
    """Return the number of directions that each model has to itself; the sum has the others.

    It is the authors' rounding, except where that would leave less than none to the sum.
    """
    return min(round((directions - int(common * directions)) / models), directions // models)
