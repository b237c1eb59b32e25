"""`nearswap`, see its catalog entry."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, NearSwapParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base

LEAST_DIFFERENCE = 1e-6  # least divisor


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, NearSwapParameters):
        raise TypeError(f"parameters of nearswap expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        t = parameters.at("t", versions.place)

        def merge(block: Block) -> Tensor:
            [delta] = block.deltas
            share = (t / delta.abs_().clamp_min_(LEAST_DIFFERENCE)).clamp_(0, 1)
            return torch.lerp(required_base(block.base), block.versions[0], share)  # exact at both ends

        return merge

    return prepare
