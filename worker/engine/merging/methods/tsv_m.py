"""`tsv_m`, see its catalog entry.

The models' weights, which the paper does not have, are factors of the singular values. In the authors' code vectors
that depend on each other are turned into whatever directions the decomposition's rounding leaves; see `isometry` and
`Components.of` for what happens to them here.
"""

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, TsvMParameters
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.merging.methods.matrices import Components, TaskMatrices, merging_matrices

ROUNDING = 1e-9  # of a number of components, which rounds down


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, TsvMParameters):
        raise TypeError(f"parameters of tsv_m expected, got {type(parameters).__name__}")

    def merged(matrices: TaskMatrices) -> Tensor:
        share = parameters.at("rank", matrices.place) / len(matrices)
        most = max(1, int(share * min(matrices.base.shape) + ROUNDING))
        parts = [Components.of(matrices[index], most, matrices.rounding) for index in range(len(matrices))]
        weighted = [
            Components(part.left, weight * part.values, part.right)
            for part, weight in zip(parts, matrices.weights, strict=True)
        ]
        return matrices.base.double() + Components.joined(weighted).matrix()

    return merging_matrices(models, merged)
