"""`task_arithmetic`, see its catalog entry. Its `scale` is applied as every method's is, by the caller."""

from collections.abc import Sequence

from torch import Tensor

from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.combine import MeasuredModel, Merger, merged_dtype, required_base


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        dtype = merged_dtype(versions)
        origin = required_base(base).to(dtype)
        merged = origin.clone()
        for model, version in zip(models, versions, strict=True):
            merged += model.weight * (version.to(dtype) - origin)
        return merged

    return merge
