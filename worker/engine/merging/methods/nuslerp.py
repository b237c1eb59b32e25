"""`nuslerp`, see its catalog entry."""

from collections.abc import Sequence

from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, NuSlerpParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import combination, model_weights
from worker.engine.merging.methods.inner_products import inner_products, products_along, summed
from worker.engine.merging.methods.slerp import spherical

LEAST_SUM = 1e-6  # least sum of weights that is a divisor


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, NuSlerpParameters):
        raise TypeError(f"parameters of nuslerp expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        first, second = model_weights(models, versions.place).tolist()
        t = second / (first + second) if abs(first + second) >= LEAST_SUM else 0.5
        if len(versions.shape) < 2 or parameters.vectors == "tensor":
            coefficients = spherical(inner_products(versions, _vectors), t)
            return lambda block: _based(block, combination(_vectors(block), coefficients))
        if parameters.vectors == "columns":
            products = summed(products_along(_matrices(block), 0) for block in versions.blocks())
            columns = spherical(products, t)[:, None]
            return lambda block: _of_matrices(block, columns)
        return lambda block: _of_matrices(block, spherical(products_along(_matrices(block), 1), t)[:, :, None])

    return prepare


def _vectors(block: Block) -> Sequence[Tensor]:
    return block.versions if block.base is None else block.deltas


def _matrices(block: Block) -> list[Tensor]:
    return [vector.flatten(1) for vector in _vectors(block)]


def _of_matrices(block: Block, coefficients: Tensor) -> Tensor:
    return _based(block, combination(_matrices(block), coefficients).view_as(block.versions[0]))


def _based(block: Block, merged: Tensor) -> Tensor:
    return merged if block.base is None else merged.add_(block.base)
