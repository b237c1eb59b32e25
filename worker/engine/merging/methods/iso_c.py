"""`iso_c`, see its catalog entry.

The mean is over the directions that the sum has. Where it has fewer than a matrix can have, the authors' code gives the
others, which its decomposition's rounding chooses, the same singular value; here they stay as they are.
"""

from torch import Tensor

from worker.engine.catalog.methods import IsoCParameters, MethodParameters
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.methods.matrices import Components, TaskMatrices, merging_matrices


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, IsoCParameters):
        raise TypeError(f"parameters of iso_c expected, got {type(parameters).__name__}")

    def merged(matrices: TaskMatrices) -> Tensor:
        total = matrices.sum()
        return (
            matrices.base.double()
            + Components.of(total, min(total.shape), len(matrices) * matrices.rounding).isotropic().matrix()
        )

    return merging_matrices(models, merged)
