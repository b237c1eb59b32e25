"""`passthrough`, see its catalog entry. Its plan has one source for every tensor, so there is nothing to compute."""

from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    def prepare(versions: Versions) -> BlockMerge:
        return lambda block: block.versions[0]

    return prepare
