"""The merge that methods which refit layers start from."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    """Build the merger of the method's start, with the scale that the start itself has."""
    from worker.engine.merging.methods import BUILDERS  # imported here because it imports the methods that start here

    start = parameters.starts_from
    if start is None:
        raise TypeError(f"{parameters.name} starts from no other method")
    merger = BUILDERS[start.name](start, models)

    def prepare(versions: Versions) -> BlockMerge:
        merge, scale = merger(versions), start.distance(versions.place)
        if scale == 1:
            return merge

        def scaled(block: Block) -> Tensor:
            base = required_base(block.base)
            return torch.add(base, merge(block) - base, alpha=scale)

        return scaled

    return prepare
