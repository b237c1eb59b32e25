"""`average`, see its catalog entry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.families import Slot
from worker.engine.catalog.methods import MethodParameters
from worker.engine.methods.combine import Merger, ScoredModel, combine


def build(parameters: MethodParameters, models: list[ScoredModel]) -> Merger:
    weights = torch.tensor([[model.weight] for model in models], dtype=torch.float64)
    weights /= weights.sum()

    def merge(slot: Slot, versions: Sequence[Tensor]) -> Tensor:
        return combine(versions, weights)

    return merge
