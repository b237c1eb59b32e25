"""`arcee_fusion`, see its catalog entry. Scores are computed in float64, and their quartiles are exact."""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from worker.engine.catalog.methods import ArceeFusionParameters, MethodParameters
from worker.engine.merging.methods.blocks import Block, BlockMerge, MeasuredModel, Merger, Versions, required_base
from worker.engine.merging.methods.inner_products import summed
from worker.engine.merging.methods.selection import nth_largest

LEAST_PROBABILITY = 1e-8  # added to each probability
OUTLYING = 1.5  # in units of the range between the quartiles


@dataclass(frozen=True)
class Softmax:
    """The normalisers of a softmax along a whole tensor, for the model and for the base."""

    model: Tensor
    base: Tensor


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, ArceeFusionParameters):
        raise TypeError(f"parameters of arcee_fusion expected, got {type(parameters).__name__}")

    def prepare(versions: Versions) -> BlockMerge:
        count = math.prod(versions.shape)
        if not count:
            return lambda block: block.versions[0]
        divergence = None  # that of a tensor of one axis, which is one row but may take several blocks
        if len(versions.shape) < 2:
            parts = [_log_sums(block) for block in versions.blocks()]
            norms = Softmax(*(reduce(torch.logaddexp, side) for side in zip(*parts, strict=True)))
            divergence = summed(_divergence(block, norms) for block in versions.blocks())

        def scores(block: Block) -> Tensor:
            [delta] = block.deltas
            of_rows = _divergence(block, None) if divergence is None else divergence
            return delta.abs_().double().mul_(of_rows)

        places = [int(share * (count - 1)) for share in (0.25, 0.5, 0.75)]  # ranks from the least
        ranks = [count - place for place in places]
        first, median, third = nth_largest(versions, lambda block: [scores(block)] * 3, ranks)
        least = median + OUTLYING * (third - first)

        def merge(block: Block) -> Tensor:
            [delta] = block.deltas
            return delta.mul_(scores(block) >= least).add_(required_base(block.base))

        return merge

    return prepare


def _divergence(block: Block, norms: Softmax | None) -> Tensor:
    """Compute `sum p log(p / q)` along the last axis, which is kept with one element."""
    model, base = block.versions[0].double(), required_base(block.base).double()
    if norms is None:
        norms = Softmax(model.logsumexp(-1, keepdim=True), base.logsumexp(-1, keepdim=True))
    p = (model - norms.model).exp_().add_(LEAST_PROBABILITY)
    q = (base - norms.base).exp_().add_(LEAST_PROBABILITY)
    terms = p * (p / q).log_()
    return terms.sum(-1, keepdim=True) if terms.dim() else terms


def _log_sums(block: Block) -> tuple[Tensor, Tensor]:
    model, base = block.versions[0], required_base(block.base)
    return model.double().flatten().logsumexp(0), base.double().flatten().logsumexp(0)
