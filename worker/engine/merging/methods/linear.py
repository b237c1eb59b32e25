"""`linear`, see its catalog entry."""

from worker.engine.catalog.methods import LinearParameters, MethodParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import combination, model_weights


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, LinearParameters):
        raise TypeError(f"parameters of linear expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        weights = model_weights(models, versions.place)
        if parameters.normalize:
            weights /= weights.sum()
        return lambda block: combination(block.versions, weights)

    return prepare
