"""`average`, see its catalog entry."""

from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.methods.combine import by_slices, model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    weights = model_weights(models)[:, None]
    weights /= weights.sum()

    def prepare(versions: Versions) -> BlockMerge:
        return by_slices(versions, weights)

    return prepare
