"""Estimators: each example's expected squared gradient over labels, as squares of a few derivatives.

The kind of head says which derivatives these are, see `HeadKind`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.tasks import Task
from worker.engine.inputs.examples import Batch
from worker.engine.models.mask_gradients import MaskGradients
from worker.engine.tasks import EstimatorName, kind_of
from worker.engine.tasks.kind import Passes

Scores = dict[ScoreName, Tensor]
"""Values by score name, (batch, nodes), float64."""


class Estimator(ABC):
    """An expectation over labels."""

    name: ClassVar[str]

    def __init__(self, task: Task) -> None:
        self._kind = kind_of(task)

    @abstractmethod
    def contrasts(self, logits: Tensor, batch: Batch) -> Passes:
        """Choose the sums of logits to differentiate, by the logits of a forward pass, (batch, …)."""

    def squares(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        """Compute each example's expected squared gradient by every mask node."""
        weights, contrasts = self.contrasts(logits.detach(), batch)
        total: Scores = {}
        for k in range(weights.shape[1]):
            for site, g in gradients.of(_combined(logits, contrasts[k]), last=k == weights.shape[1] - 1).items():
                square = g.square().mul_(weights[:, k, None])
                total[site] = total[site] + square if site in total else square
        return total


def _combined(logits: Tensor, coefficients: Tensor) -> Tensor:
    """Sum each example's logits with these coefficients, (batch,)."""
    return (coefficients.to(logits.dtype) * logits).flatten(1).sum(-1)


class Expected(Estimator):
    """The expected squared gradient over the model's own labels."""

    name = "expected"

    def contrasts(self, logits: Tensor, batch: Batch) -> Passes:
        return self._kind.expected(logits, batch)


class Empirical(Estimator):
    """The square of the gradient of the log-likelihood of the row's own label."""

    name = "empirical"

    def contrasts(self, logits: Tensor, batch: Batch) -> Passes:
        if batch.labels is None:
            raise RuntimeError("the empirical estimator needs labels; planning should have refused this")
        return self._kind.empirical(logits, batch, batch.labels)

    def gradients(self, logits: Tensor, batch: Batch, gradients: MaskGradients) -> Scores:
        """Compute the gradients themselves, for the published rule, which squares their batch mean."""
        _, contrasts = self.contrasts(logits.detach(), batch)
        return gradients.of(_combined(logits, contrasts[0]), last=True)


class Sampled(Estimator):
    """The square of the gradient of a label drawn from the model, seeded per example."""

    name = "sampled"

    def __init__(self, task: Task, seed: int) -> None:
        super().__init__(task)
        self.seed = seed

    def contrasts(self, logits: Tensor, batch: Batch) -> Passes:
        return self._kind.sampled(logits, batch, self.seed)


def estimator_for(name: EstimatorName, task: Task, seed: int) -> Estimator:
    """Make the estimator for a head; `auto` is resolved."""
    match kind_of(task).estimator(name):
        case "expected":
            return Expected(task)
        case "sampled":
            return Sampled(task, seed)
        case "empirical":
            return Empirical(task)
