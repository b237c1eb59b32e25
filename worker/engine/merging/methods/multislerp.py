"""`multislerp`, see its catalog entry."""

from collections.abc import Sequence

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, MultiSlerpParameters
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import combination, model_weights
from worker.engine.merging.methods.inner_products import inner_products


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MultiSlerpParameters):
        raise TypeError(f"parameters of multislerp expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place)
        if parameters.normalize_weights:
            weights /= weights.sum()
        if len(models) == 1:
            return lambda block: block.versions[0]
        found = mean_direction(inner_products(versions, _vectors), weights, parameters.eps)
        if found is None:
            problem = f"the directions of the models cancel out in tensor {versions.slot.name}, so they have no mean"
            raise NumericalError(f"{problem}; give them other weights", tensor=versions.slot.name)
        coefficients = found

        def merge(block: Block) -> Tensor:
            merged = combination(_vectors(block), coefficients)
            return merged if block.base is None else merged.add_(block.base)

        return merge

    return prepare


def mean_direction(products: Tensor, weights: Tensor, eps: float) -> Tensor | None:
    """Compute factors of the vectors, (vectors,), float64; None if they have no mean direction.

    Between two opposites, and for vectors that are all zero, the result is that of the straight line.

    Args:
        products: inner products of the vectors, (vectors, vectors), float64.
    """
    lengths = products.diagonal().sqrt()
    shares = weights / (lengths + eps)
    length = (shares @ products @ shares).clamp_min(0).sqrt()
    if not bool(length < eps):  # NaN goes on, so that it is noticed
        return shares * ((weights * lengths).sum() / length)
    return weights if len(weights) == 2 or not bool(lengths.any()) else None


def _vectors(block: Block) -> Sequence[Tensor]:
    return block.versions if block.base is None else block.deltas
