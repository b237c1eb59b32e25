"""`average`, see its catalog entry."""

from worker.engine.catalog.methods import MethodParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_slices, model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    return average(models)


def average(models: list[MeasuredModel]) -> Merger:
    """Make the average by the models' weights, which any job may need beside its method."""

    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place)[:, None]
        return by_slices(versions, weights / weights.sum())

    return prepare
