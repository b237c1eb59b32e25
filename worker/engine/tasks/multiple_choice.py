"""One of a row's choices is right: the likelihood is the softmax of their logits.

The model reads each choice by itself, as a sequence of the text and the choice.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.data.rows import Row, Text
from worker.engine.catalog.tasks import MetricName, MultipleChoice
from worker.engine.inputs.examples import Batch, Example
from worker.engine.tasks import metrics
from worker.engine.tasks.classification import contrasts, drawn
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import HeadKind, Passes
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.smoothing import scaled


class MultipleChoiceHead(HeadKind[MultipleChoice]):
    """Predictions are places of choices. Logits are of sequences, (batch, 1), each row's in a run."""

    def sequences(self, row: Row) -> Sequence[tuple[Text, Text | None]]:
        return [(row.text, choice) for choice in row.choices or ()]

    def arguments(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sequences as the choices of one row: (1, batch, tokens); the model reads each by itself."""
        return {name: values[None] for name, values in inputs.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().run(inputs)[0][:, None]

    def predictions_of(self, example: Example) -> int:
        return 1

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the passes of `sum_y p_y d_y^2 - (sum_y p_y d_y)^2`, as for classes."""
        weights, coefficients = contrasts(_of_rows(logits, batch))
        return weights, [_sums(logits, of_pass, batch) for of_pass in coefficients]

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        z = _of_rows(logits, batch)
        draws = torch.tensor([uniform(seed, int(i)) for i in batch.indices], dtype=torch.float64)
        last = z.isfinite().sum(1) - 1
        return self.empirical(logits, batch, torch.minimum(drawn(z, draws), last))

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        p = _of_rows(logits, batch).detach().double().softmax(1)
        own = torch.zeros_like(p).scatter_(1, labels[:, None], 1.0)
        weights = torch.ones(len(batch), 1, dtype=torch.float64, device=logits.device)
        return weights, [_sums(logits, own - p, batch)]

    def decision(self, logits: Tensor) -> Tensor:
        raise TypeError("choices are decided by their rows, see `predicted`")

    def predicted(self, logits: Tensor, examples: Sequence[Example] = ()) -> Array:
        return np.array([float(of_row.argmax()) for of_row in _split(logits, examples)])

    def metric(self, name: MetricName) -> Metric:
        return metrics.SIMPLE[name]

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        right = np.stack([one == labels for one in predictions]).astype(float)
        return lambda counts: np.asarray(right @ counts / counts.sum(0))

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        """Return the smoothed share: a row is partly right by how far the right choice is ahead of the best other."""
        rows = zip(_split(logits, examples), labels.astype(int), strict=True)
        margins = [of_row[label] - np.delete(of_row, label).max() for of_row, label in rows]
        return float(scaled(torch.tensor(np.array(margins))).sigmoid().mean())


KIND = MultipleChoiceHead


def _of_rows(logits: Tensor, batch: Batch) -> Tensor:
    """Return each row's logits, (rows, choices), with minus infinity where a row has fewer choices."""
    rows, places = batch.sequences
    found = logits.new_full((len(batch), int(places.max()) + 1), -torch.inf)
    found[rows, places] = logits.detach()[:, 0]
    return found


def _sums(logits: Tensor, coefficients: Tensor, batch: Batch) -> Tensor:
    """Sum each row's logits with coefficients, (rows, choices): (rows,)."""
    return batch.by_row(coefficients[batch.sequences].to(logits.dtype) * logits[:, 0])


def _split(logits: Tensor, examples: Sequence[Example]) -> list[Array]:
    parts = torch.split(logits[:, 0].cpu().double(), [example.outputs for example in examples])
    return [part.numpy() for part in parts]
