"""The interface of a kind of head: the derivatives of its scores, its predictions, and its metrics."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.prediction import Answer
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset, NumericalError, Place
from worker.engine.catalog.tasks import Label, LabelMap, MetricName, Task
from worker.engine.inputs.examples import (
    Answers,
    Batch,
    Example,
    OneOutput,
    Tokenized,
    collate,
    labels_of,
    plan_batches,
    tokenize,
)
from worker.engine.runtime.device import Precision, computing_in
from worker.engine.runtime.progress import OnRows
from worker.engine.tasks.last_token import (
    end_token_problem,
    logits_of_last_token,
    reads_end_token,
    reads_last_token,
)
from worker.engine.tasks.metrics import CORRELATIONS, Array, Metric, ResampledMetric

AUTO_EXPECTED_LABELS = 8  # they take K - 1 backward passes; beyond this, one with a drawn label uses time better

TINY = torch.finfo(torch.float64).tiny  # replaces a divisor of 0 where the quotient does not count

EstimatorName = Literal["auto", "expected", "sampled", "empirical"]
ResolvedEstimator = Literal["expected", "sampled", "empirical"]
Passes = tuple[Tensor, Sequence[Tensor]]
"""Weights of squared derivatives, (batch, passes), float64, and for each pass the sums to differentiate, (batch,), each
of which depends on its own example alone."""
T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Running:
    """How a model is run on rows."""

    source: str
    """Name of the model in messages."""
    rows: str
    """Name of the data set in messages."""
    tokenizer: Any
    """Its tokenizer, or its image processor."""
    padding: Mapping[str, int]
    """Value that pads each model input."""
    device: torch.device
    precision: Precision
    on_rows: OnRows

    def not_finite(self, place: Place) -> NumericalError:
        """Return the error of logits that are not finite on a row."""
        problem = f"{self.source} gives logits that are NaN or infinite on {place} of {self.rows}"
        return NumericalError(problem, **{place.unit: place.number})


@dataclass(frozen=True)
class PlacedBatch:
    """A batch, with the places of what belongs to its examples among that of all examples."""

    batch: Batch
    examples: Sequence[Example]
    predictions: Sequence[int]
    """Places of their predictions."""
    outputs: Sequence[int]
    """Places of their outputs."""


class HeadKind(OneOutput, ABC, Generic[T]):
    """A kind of head. An example's expected squared gradient is the sum over passes of `weight` times the squared
    derivative of a sum, one backward pass each. Nothing is subtracted, so nearly certain predictions lose no digits.

    Args:
        model: the model that has the head; None where nothing is run.
    """

    libraries: tuple[str, ...] = ("tokenizers", "transformers")
    """Distributions whose versions decide a row's inputs."""

    def __init__(self, task: T, model: nn.Module | None = None) -> None:
        self.task = task
        self.model = model

    def evaluated(self, evaluation: EvaluationSpec) -> "HeadKind[T]":
        """Return the head as a metric needs it, if the metric reads rows or runs the model in a way of its own."""
        return self

    def tokenized(
        self,
        rows: Sequence[Row],
        spec: DatasetSpec,
        tokenizer: Any,
        max_length: int,
        labels: LabelMap | None,
        first: int = 0,
    ) -> Tokenized:
        """Make an example of each row. Raises InvalidDataset, see `tokenize`."""
        return tokenize(rows, spec, tokenizer, max_length, labels, first, self)

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        if encoding is not None and self.model is not None and reads_end_token(self.model):
            problem = end_token_problem(self.model, encoding)
            if problem is not None:
                raise InvalidDataset(source, problem, row.place)
        return super().answers(row, encoding, label, source)

    def arguments(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the model's arguments for padded inputs, (batch, tokens) each."""
        return inputs

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model on padded inputs, (batch, tokens) each, and return its logits, (batch, …)."""
        if self.model is None:
            raise TypeError("this head has no model to run")
        if reads_last_token(self.model):
            return logits_of_last_token(self.model, inputs)
        logits: Tensor = self.model(**self.arguments(inputs)).logits
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

    def predicted(self, logits: Tensor, examples: Sequence[Example] = ()) -> Array:
        """Compute the predictions of rows by what decides them; some kinds need the rows too."""
        return self.decision(logits).cpu().double().numpy()

    def predictions(self, examples: Sequence[Example], running: Running) -> Array:
        """Run the model, and return predictions in the order of `examples`, see `predicted`.

        Raises:
            NumericalError: what decides a prediction is NaN or infinite; the message names the row.
        """
        found = self.unknown(examples)
        for part, judged in self.parts(examples, running):
            found[part.predictions] = self.predicted(judged, part.examples)
            running.on_rows(len(part.batch))
        return found

    def answered(self, examples: Sequence[Example], running: Running) -> list[Answer]:
        """Run the model, and return its answer to each row. Raises NumericalError, see `predictions`."""
        found: dict[int, Answer] = {}
        for part, judged in self.parts(examples, running):
            by_row = torch.split(judged.cpu().double(), [self.predictions_of(example) for example in part.examples])
            found |= zip(part.batch.indices.tolist(), map(self.answer, by_row), strict=True)
            running.on_rows(len(part.batch))
        return [found[row] for row in range(len(examples))]

    def answer(self, judged: Tensor) -> Answer:
        """Return the answer to one row by what decides its predictions, (predictions, …), float64.

        A kind whose task `answers_rows` has it, unless it answers in another way.
        """
        raise TypeError(f"answers of a {self.task.title} to single rows are not told")

    def unknown(self, examples: Sequence[Example]) -> Array:
        """Make an array for predictions."""
        return np.full((sum(map(self.predictions_of, examples)), *self.shape), np.nan)

    def parts(self, examples: Sequence[Example], running: Running) -> Iterator[tuple[PlacedBatch, Tensor]]:
        """Run the model, and yield what decides the predictions of some examples at a time.

        A batch's indices are places in `examples`, which may be only some of a data set's.
        """
        numbered = [replace(example, index=index) for index, example in enumerate(examples)]
        first, second = (
            [0, *accumulate(map(count, examples))] for count in (self.predictions_of, lambda example: example.outputs)
        )
        with torch.inference_mode():
            for batch in collate(plan_batches(numbered), running.padding, running.device):
                with computing_in(running.precision, running.device):
                    judged = self.judged(self.run(batch.inputs), batch)
                indices = batch.indices.tolist()
                predictions, outputs = (
                    [place for row in indices for place in range(of[row], of[row + 1])] for of in (first, second)
                )
                part = PlacedBatch(batch, [examples[row] for row in indices], predictions, outputs)
                _check_finite(judged, part, running)
                yield part, judged

    @abstractmethod
    def metric(self, name: MetricName) -> Metric:
        """Return one of the task's metrics."""

    def undefined(self, name: MetricName, labels: Array, source: str) -> str | None:
        """Say why the labels of a data set alone make a metric 0, whatever is predicted; None if they do not."""
        if name in CORRELATIONS and np.ptp(labels) == 0:
            return f"all labels of {source} are the same, so {name} is not defined, and is given as 0"
        return None

    @abstractmethod
    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        """Return the metric of every prediction on resampled rows."""

    @abstractmethod
    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        """Compute the smoothed metric, in which predictions are partly right, see `worker.engine.tasks.smoothing`."""

    def retention(self, name: MetricName, value: float, expert: float) -> float | None:
        """Return what a value keeps of the expert's, 1 where they are equal; None if one of them is not positive."""
        if expert <= 0 or (name in self.task.minimised and value <= 0):
            return None
        return expert / value if name in self.task.minimised else value / expert

    def answer_tokens(self, name: MetricName, predictions: Array) -> float | None:
        """Return the mean number of tokens of a row's answer, if the model writes one; else None."""
        return None

    def answers_fit(self, name: MetricName, predictions: Array) -> float | None:
        """Return the share of answers in which the stated pattern is found, if the model writes any; else None."""
        return None

    def likely_permutation(self, labels: Array, predictions: Array) -> list[int] | None:
        """Return the classes that the data set's ids probably mean, in the order of these ids; None if they agree."""
        return None


def _check_finite(judged: Tensor, part: PlacedBatch, running: Running) -> None:
    """Raise NumericalError, which names the row, where a value is not finite; each row has as many values."""
    is_finite = torch.isfinite(judged).flatten(1).all(1).tolist()
    if all(is_finite):
        return
    by_output = len(judged) == len(part.outputs)
    rows = [example for example in part.examples for _ in range(example.outputs if by_output else 1)]
    place = rows[is_finite.index(False)].place
    raise running.not_finite(place)


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
