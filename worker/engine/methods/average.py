"""`average`, see its catalog entry."""

from collections.abc import Sequence

from torch import Tensor

from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.combine import MeasuredModel, Merger, combine, model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    weights = model_weights(models)[:, None]
    weights /= weights.sum()

    def merge(slot: Slot, versions: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        return combine(versions, weights)

    return merge
