"""Which label the gradient is of: each example's expected squared gradient, as squares of a few derivatives.

Every estimator says which: with `z` the logits, an example's expected square is the sum over passes of `weight` times
the squared derivative of `sum_y contrast_y z_y`, one backward pass each. Nothing is subtracted, so nearly certain
predictions lose no digits.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from worker.engine.catalog.data.labels import Task
from worker.engine.inputs.examples import Batch
from worker.engine.models.mask_gradients import MaskGradients

TINY = torch.finfo(torch.float64).tiny  # instead of 0 where a quotient does not count
AUTO_EXPECTED_LABELS = 8  # K - 1 backward passes; beyond this, one with a drawn label is the better use of the time

Scores = dict[str, Tensor]
"""By score name: (batch, nodes), float64."""
EstimatorName = Literal["auto", "expected", "sampled", "empirical"]


class Estimator(ABC):
    """An expectation over labels."""

    name: ClassVar[str]

    @abstractmethod
    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What to differentiate.

        Args:
            logits: (batch, labels).

        Returns:
            Weights of the squares, (batch, passes), and coefficients of the logits, (batch, passes, labels); float64.
        """

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        """Each example's expected squared gradient by every mask node."""
        weights, contrasts = self.contrasts(logits.detach(), batch)
        total: Scores = {}
        for k in range(weights.shape[1]):
            output = (contrasts[:, k].to(logits.dtype) * logits).sum(-1)
            for site, g in gradients.of(output, last=k == weights.shape[1] - 1).items():
                square = g.square().mul_(weights[:, k, None])
                total[site] = total[site] + square if site in total else square
        return total


def estimator_for(name: EstimatorName, task: Task, seed: int) -> Estimator:
    """The estimator of a head. A regression head has one Gaussian of unit variance, whatever the name.

    For regression the expected square is the square of the prediction's own derivative; `empirical` keeps the row's
    residual.
    """
    if name == "empirical":
        return Empirical(task)
    if task.problem == "regression":
        return Regression()
    several = task.problem == "multi_label"
    if name == "sampled" or (name == "auto" and task.outputs > AUTO_EXPECTED_LABELS):
        return SampledDecisions(seed) if several else Sampled(seed)
    return ExpectedDecisions() if several else Expected()


class Expected(Estimator):
    """Over the model's own labels: `sum_y p_y d_y^2 - (sum_y p_y d_y)^2`, with `d_y` the derivative of `z_y`.

    By the law of total variance, label by label from the likeliest on, with `s_k` the sum of `p_k` and all after it and
    `m_k` their mean of `d`: `sum_k p_k s_k+1 / s_k (d_k - m_k+1)^2`. K labels cost K - 1 backward passes on one graph.
    """

    name = "expected"

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        p, ranked = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)  # (batch, labels)
        sums = p.flip(-1).cumsum(-1).flip(-1)
        later = sums[:, 1:]
        weights = p[:, :-1] * later / sums[:, :-1].clamp_min(TINY)
        mean_of_later = p[:, None] / later.clamp_min(TINY)[:, :, None]  # (batch, labels - 1, labels)
        contrasts = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:-1] - mean_of_later.triu(1)
        return weights, torch.zeros_like(contrasts).scatter(-1, ranked[:, None].expand_as(contrasts), contrasts)


class ExpectedDecisions(Estimator):
    """Of a multi-label head, whose labels apply independently of each other: `sum_k p_k (1 - p_k) d_k^2`.

    K labels cost K backward passes on one graph.
    """

    name = "expected"

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        z = logits.double()
        each = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return z.sigmoid() * (-z).sigmoid(), each.expand(len(z), -1, -1)  # 1 - p without cancellation


class Empirical(Estimator):
    """The square of the gradient of the log-likelihood of the row's own label."""

    name = "empirical"

    def __init__(self, task: Task) -> None:
        self._task = task

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.labels is None:
            raise RuntimeError("the empirical estimator needs labels; planning should have refused this")
        if self._task.problem == "regression":
            return _one_pass(batch.labels.double()[:, None] - logits.double())
        if self._task.problem == "multi_label":
            return _one_pass(batch.labels.double() - logits.double().sigmoid())
        return _one_pass(_likelihood(logits, batch.labels))

    def gradients(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        """The gradients themselves, for the published rule, which squares their batch mean."""
        _, contrasts = self.contrasts(logits.detach(), batch)
        return gradients.of((contrasts[:, 0].to(logits.dtype) * logits).sum(-1), last=True)


class Sampled(Estimator):
    """The square of the gradient of a label drawn from the model, seeded per example."""

    name = "sampled"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        cumulative = logits.double().softmax(-1).cumsum(-1)
        draws = torch.tensor([uniform(self.seed, int(i)) for i in batch.indices], dtype=torch.float64)
        drawn = (draws[:, None].to(cumulative.device) >= cumulative[:, :-1]).sum(-1)  # (batch,)
        return _one_pass(_likelihood(logits, drawn))


class SampledDecisions(Sampled):
    """The same of a multi-label head: whether each label applies is drawn by itself."""

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        p = logits.double().sigmoid()
        draws = [[uniform(self.seed, int(i), label) for label in range(p.shape[1])] for i in batch.indices]
        drawn = torch.tensor(draws, dtype=torch.float64).to(p.device) < p
        return _one_pass(drawn.double() - p)


class Regression(Estimator):
    """Unit-variance Gaussian: the expected squared gradient is the square of the prediction's derivative."""

    name = "expected"

    def contrasts(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return _one_pass(torch.ones_like(logits, dtype=torch.float64))


def _likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The derivative of each example's `log p` of its label by the logits: (batch, labels), float64."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1])
    return own - logits.double().softmax(-1)


def _one_pass(contrast: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(len(contrast), 1, dtype=torch.float64, device=contrast.device), contrast[:, None]


def uniform(seed: int, index: int, label: int = 0) -> float:
    """A number in [0, 1) for one example (and label): the same however rows are batched or sharded."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, index, label), digest_size=8).digest()
    return float(struct.unpack("<Q", digest)[0] >> 11) / 2**53
