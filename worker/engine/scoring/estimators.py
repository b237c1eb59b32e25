"""Which label the gradient is of: from logits and mask gradients to each example's squared scores.

Notation: `z` logits (batch, labels), `p` their softmax, `d_y` the derivative of `z_y - z_r` by a node, with `r` the
likeliest label. The gradient of `log p_y` is `d_y - sum_k p_k d_k`.
"""

import hashlib
import struct
from typing import Literal, Protocol

import torch
from torch import Tensor

from worker.engine.catalog.labels import Task
from worker.engine.scoring.data import Batch
from worker.engine.scoring.masks import MaskGradients

AUTO_EXPECTED_LABELS = 8  # K - 1 backward passes; beyond this, one with a drawn label is the better use of the time

Scores = dict[str, Tensor]
"""By score name: (batch, nodes), float64."""
EstimatorName = Literal["auto", "expected", "sampled", "empirical"]


class Estimator(Protocol):
    """Each example's squared gradient by every mask node, (batch, nodes) per score name, float64."""

    name: str

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores: ...


def estimator_for(name: EstimatorName, task: Task, seed: int) -> Estimator:
    """The estimator of a head. A regression head has one Gaussian of unit variance, whatever the name.

    For regression the expected square is the square of the prediction's own derivative; `empirical` keeps the row's
    residual.
    """
    if name == "empirical":
        return Empirical(task)
    if task.problem == "regression":
        return Regression()
    if name == "sampled" or (name == "auto" and task.outputs > AUTO_EXPECTED_LABELS):
        return Sampled(seed)
    return Expected()


class Expected:
    """`sum_y p_y d_y^2 - (sum_y p_y d_y)^2`: the exact expectation over the model's own labels.

    K labels cost K - 1 backward passes on one graph (`d_r` is zero). Any label may be the reference `r`; with the
    likeliest, nearly certain predictions lose no digits in the difference.
    """

    name = "expected"

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        labels = logits.shape[1]
        probabilities = logits.detach().double().softmax(-1)  # (batch, labels)
        mean: Scores = {}
        square: Scores = {}
        ranked = probabilities.sort(dim=-1, descending=True, stable=True).indices  # (batch, labels)
        reference = logits.gather(1, ranked[:, :1])
        for rank in range(1, labels):
            y = ranked[:, rank, None]  # each example has its own order, so each pass has a label of its own for each
            p = probabilities.gather(1, y)
            margin = (logits.gather(1, y) - reference)[:, 0]
            for site, d in gradients.of(margin, last=rank == labels - 1).items():
                weighted = p * d
                mean[site] = mean[site] + weighted if site in mean else weighted
                square[site] = square[site] + weighted * d if site in square else weighted * d
        # Non-negative by Jensen; rounding may leave -1e-20.
        return {site: (square[site] - mean[site] ** 2).clamp_min(0) for site in square}


class Empirical:
    """The square of the gradient of the log-likelihood of the row's own label."""

    name = "empirical"

    def __init__(self, task: Task) -> None:
        self._task = task

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        return {site: g**2 for site, g in self.gradients(logits, batch, gradients).items()}

    def gradients(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        """The gradients themselves, for the published rule, which squares their batch mean."""
        if batch.labels is None:
            raise RuntimeError("the empirical estimator needs labels; planning should have refused this")
        if self._task.problem == "regression":
            likelihood = -0.5 * (logits[:, 0].float() - batch.labels.float()) ** 2
        else:
            likelihood = logits.float().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return gradients.of(likelihood, last=True)


class Sampled:
    """The square of the gradient of a label drawn from the model, seeded per example."""

    name = "sampled"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        cumulative = logits.detach().double().softmax(-1).cumsum(-1)
        draws = torch.tensor([uniform(self._seed, int(i)) for i in batch.indices], dtype=torch.float64)
        drawn = (draws[:, None].to(cumulative.device) >= cumulative[:, :-1]).sum(-1)  # (batch,)
        likelihood = logits.float().log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        return {site: g**2 for site, g in gradients.of(likelihood, last=True).items()}


class Regression:
    """Unit-variance Gaussian: the expected squared gradient is the square of the prediction's derivative."""

    name = "expected"

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        return {site: g**2 for site, g in gradients.of(logits[:, 0], last=True).items()}


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for one example: the same however rows are batched or sharded."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return float(struct.unpack("<Q", digest)[0] >> 11) / 2**53
