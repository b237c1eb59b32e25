"""The interface of a kind of head: the derivatives of its scores, its predictions, and its metrics."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from worker.engine.catalog.tasks import MetricName, Task
from worker.engine.inputs.examples import Batch, OneOutput
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric

AUTO_EXPECTED_LABELS = 8  # they take K - 1 backward passes; beyond this, one with a drawn label uses time better

TINY = torch.finfo(torch.float64).tiny  # replaces a divisor of 0 where the quotient does not count

EstimatorName = Literal["auto", "expected", "sampled", "empirical"]
ResolvedEstimator = Literal["expected", "sampled", "empirical"]
Passes = tuple[Tensor, Sequence[Tensor]]
"""Weights of squared derivatives, (batch, passes), and for each pass the coefficients of the logits whose sum is
differentiated, in the logits' shape; float64."""
T = TypeVar("T", bound=Task)


class HeadKind(OneOutput, ABC, Generic[T]):
    """A kind of head. With `z` the logits, an example's expected squared gradient is the sum over passes of `weight`
    times the squared derivative of `sum_y coefficient_y z_y`, one backward pass each. Nothing is subtracted, so nearly
    certain predictions lose no digits."""

    def __init__(self, task: T) -> None:
        self.task = task

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one label, or prediction."""
        return ()

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio of the batch's loss in the published code to its rows' mean negative log-likelihood."""
        return 1.0

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the estimator that is used where `asked` is asked for."""
        if asked != "auto":
            return asked
        return "sampled" if self.task.outputs > AUTO_EXPECTED_LABELS else "expected"

    @abstractmethod
    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the passes of the expected squared gradient over the model's own labels."""

    @abstractmethod
    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        """Give the passes of the gradient for a label that is drawn from the model, seeded per example."""

    @abstractmethod
    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        """Give the passes of the gradient for the batch's own labels, as in `Batch.labels`."""

    @abstractmethod
    def decision(self, logits: Tensor) -> Tensor:
        """Compute a prediction from each row of logits, in the shape of the labels: (rows, outputs) to (rows, …)."""

    def predicted(self, logits: Tensor) -> Array:
        return self.decision(logits).cpu().double().numpy()

    @abstractmethod
    def metric(self, name: MetricName) -> Metric:
        """Return one of the task's metrics."""

    @abstractmethod
    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        """Return the metric of every prediction on resampled rows."""

    @abstractmethod
    def smoothed(self, name: MetricName, labels: Array, logits: Tensor) -> float:
        """Compute the smoothed metric, in which predictions are partly right, see `worker.engine.tasks.smoothing`."""

    def likely_permutation(self, labels: Array, predictions: Array) -> list[int] | None:
        """Return the classes that the data set's ids probably mean, in the order of these ids; None if they agree."""
        return None


def one_pass(coefficients: Tensor) -> Passes:
    """Give passes of one squared derivative each, with coefficients (batch, …)."""
    weights = torch.ones(len(coefficients), 1, dtype=torch.float64, device=coefficients.device)
    return weights, [coefficients]
