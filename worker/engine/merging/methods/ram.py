"""`ram` and `ramplus_tl`, see their catalog entries."""

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, RamParameters, RamPlusParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.inner_products import summed


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, RamParameters | RamPlusParameters):
        raise TypeError(f"parameters of ram expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        epsilon = parameters.at("epsilon", versions.place)
        alone = [1.0] * len(models)
        if isinstance(parameters, RamPlusParameters):
            counts = summed(_counts(changes(block.deltas, epsilon)) for block in versions.blocks())
            rho = counts[0] / counts[1].clamp_min(epsilon if epsilon > 0 else 1.0)
            most, r = parameters.at("alpha", versions.place), parameters.at("r", versions.place)
            alone = (1 + r * rho.clamp(0, most)).tolist()

        def merge(block: Block) -> Tensor:
            deltas = block.deltas
            changed = changes(deltas, epsilon)
            count = _count(changed).to(deltas[0].dtype)
            total = torch.zeros_like(deltas[0])
            for delta, has, factor in zip(deltas, changed, alone, strict=True):
                delta.mul_(has)  # a product keeps NaN
                if factor != 1:
                    delta.addcmul_(delta, (count == 1).to(delta.dtype), value=factor - 1)
                total.add_(delta)
            return total.div_(count.clamp_min_(1)).add_(required_base(block.base))

        return merge

    return prepare


def changes(deltas: list[Tensor], epsilon: float) -> list[Tensor]:
    """Mark the elements in which each model changes the base."""
    return [delta.abs() > epsilon for delta in deltas]


def _count(changed: list[Tensor]) -> Tensor:
    """Count the models that change each element."""
    count = torch.zeros_like(changed[0], dtype=torch.int32)
    for has in changed:
        count.add_(has)
    return count


def _counts(changed: list[Tensor]) -> Tensor:
    """Count the elements that each model changes together with others, and those that it changes alone: (2, models)."""
    count = _count(changed)
    pairs = [[int((has & (count > 1)).sum()), int((has & (count == 1)).sum())] for has in changed]
    return torch.tensor(pairs, dtype=torch.float64).T
