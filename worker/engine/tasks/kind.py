"""The interface of a kind of head: the derivatives of its scores, its predictions, and its metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from worker.engine.catalog.tasks import MetricName, Task
from worker.engine.inputs.examples import Batch, Example, OneOutput, labels_of
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric

AUTO_EXPECTED_LABELS = 8  # they take K - 1 backward passes; beyond this, one with a drawn label uses time better

TINY = torch.finfo(torch.float64).tiny  # replaces a divisor of 0 where the quotient does not count

EstimatorName = Literal["auto", "expected", "sampled", "empirical"]
ResolvedEstimator = Literal["expected", "sampled", "empirical"]
Passes = tuple[Tensor, Sequence[Tensor]]
"""Weights of squared derivatives, (batch, passes), float64, and for each pass the sums to differentiate, (batch,), each
of which depends on its own example alone."""
T = TypeVar("T", bound=Task)


class HeadKind(OneOutput, ABC, Generic[T]):
    """A kind of head. An example's expected squared gradient is the sum over passes of `weight` times the squared
    derivative of a sum, one backward pass each. Nothing is subtracted, so nearly certain predictions lose no digits.

    Args:
        model: the model that has the head; None where nothing is run.
    """

    def __init__(self, task: T, model: nn.Module | None = None) -> None:
        self.task = task
        self.model = model

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model on padded inputs, (batch, tokens) each, and return its logits, (batch, …)."""
        if self.model is None:
            raise TypeError("this head has no model to run")
        logits: Tensor = self.model(**inputs).logits
        return logits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one label, or prediction."""
        return ()

    def predictions_of(self, example: Example) -> int:
        """Return the number of predictions that are judged in a row."""
        return example.outputs

    def truth(self, examples: Sequence[Example]) -> Array:
        """Return the labels by which predictions are judged, row by row: (predictions,) or (predictions, labels)."""
        return labels_of(examples)

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

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return what decides each prediction, row by row: here the logits, (predictions, labels), float32."""
        return batch.of_outputs(outputs).float()

    @abstractmethod
    def decision(self, logits: Tensor) -> Tensor:
        """Compute each prediction from what decides it, in the shape of the labels: (predictions, …) to the same."""

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

    def retention(self, name: MetricName, value: float, expert: float) -> float | None:
        """Return what a value keeps of the expert's, 1 where they are equal; None if one of them is not positive."""
        if expert <= 0 or (name in self.task.minimised and value <= 0):
            return None
        return expert / value if name in self.task.minimised else value / expert

    def likely_permutation(self, labels: Array, predictions: Array) -> list[int] | None:
        """Return the classes that the data set's ids probably mean, in the order of these ids; None if they agree."""
        return None


def one_pass(logits: Tensor, coefficients: Tensor) -> Passes:
    """Give one pass over the sum of logits, (batch, …), with these coefficients, in the same shape."""
    weights = torch.ones(len(coefficients), 1, dtype=torch.float64, device=coefficients.device)
    return weights, [combined(logits, coefficients)]


def combined(logits: Tensor, coefficients: Tensor) -> Tensor:
    """Sum each example's logits, (batch, …), with these coefficients, in the same shape: (batch,)."""
    return (coefficients.to(logits.dtype) * logits).flatten(1).sum(-1)


class Combined(Sequence[Tensor]):
    """Sums of logits that are made when they are asked for: a sum for each label may not fit into memory at once."""

    def __init__(self, logits: Tensor, coefficients: Sequence[Tensor]) -> None:
        self._logits, self._coefficients = logits, coefficients

    def __len__(self) -> int:
        return len(self._coefficients)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Combined(self._logits, self._coefficients[index])
        return combined(self._logits, self._coefficients[index])
