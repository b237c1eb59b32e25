"""`passthrough`, see its catalog entry. Its plan has one source for every tensor."""

from worker.engine.catalog.methods import MethodParameters, PassthroughParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, PassthroughParameters):
        raise TypeError(f"parameters of passthrough expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        scale = parameters.at("scale", versions.place)
        return lambda block: block.versions[0] if scale == 1 else block.versions[0] * scale

    return prepare
