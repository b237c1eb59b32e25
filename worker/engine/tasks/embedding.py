"""Texts have embeddings. A row of one text has the likelihood of a vector, a Gaussian of unit variance around the
embedding; a row of two texts that of a similarity, a Gaussian around the similarity of their embeddings.

Where embeddings are compared by their cosine, they have length 1 here. Then a von Mises-Fisher distribution around the
embedding has the same Fisher information up to a factor, which is the same for all nodes: both are of directions alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from worker.engine.catalog.checkpoints.modules import SENTENCE_MODULES
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row, Text
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import Embedding, Label, MetricName
from worker.engine.inputs.examples import Answers, Batch, Example
from worker.engine.tasks import metrics
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import EstimatorName, HeadKind, Passes, ResolvedEstimator
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.smoothing import scaled

RESAMPLED = {"pearson": metrics.resampled_pearson, "spearman": metrics.resampled_spearman}
ROWS = 1024  # rows whose similarities to all others are held at once
ROUNDING = 1e-6  # difference between similarities that counts as none: equal texts may be computed in other batches


class EmbeddingHead(HeadKind[Embedding]):
    """The outputs of a model are embeddings of texts, (batch, width); a row with two texts has those of both.

    The prediction of a row is the embeddings of its two texts, one after the other.
    """

    def evaluated(self, evaluation: EvaluationSpec) -> HeadKind[Embedding]:
        return _Evaluated(self.task, self.model)

    def sequences(self, row: Row) -> Sequence[tuple[Text, Text | None]]:
        return [(row.text, None)] if row.text_pair is None else [(row.text, None), (row.text_pair, None)]

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        if label is not None and row.text_pair is None:
            raise InvalidDataset(source, "a label is the similarity of two texts; name text_pair", row.place)
        if isinstance(label, int | float) and abs(label) > 1 and self.task.similarity == "cosine":
            problem = f"its label {label:g} is no cosine; scale labels to values between -1 and 1"
            raise InvalidDataset(source, f"{problem}, or choose another estimator", row.place)
        return Answers(None, label)

    def run(self, inputs: Any) -> Tensor:
        """Run the model on padded inputs, and return embeddings; those that are compared by cosine have length 1."""
        model: Any = self.model
        hidden = model(**self.arguments(inputs)).last_hidden_state
        found: Tensor = getattr(model, SENTENCE_MODULES)(hidden, inputs["attention_mask"])
        return normalize(found, dim=-1) if self.task.similarity == "cosine" else found

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * self.task.outputs,)

    def predictions_of(self, example: Example) -> int:
        return 1

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the squared error, twice the Gaussian's."""
        return 2.0

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the estimator; the default takes one pass, also where rows have one text."""
        return "sampled" if asked == "auto" else asked

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give a pass for each number of an embedding, or, where rows have two texts, one of their similarity."""
        if batch.rows is not None:
            return _one_pass(_similarities(logits, batch))
        weights = torch.ones(len(batch), logits.shape[1], dtype=torch.float64, device=logits.device)
        return weights, logits.unbind(1)

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        """Give the pass of a vector that is drawn around the embedding; a similarity has one number, and needs none."""
        if batch.rows is not None:
            return self.expected(logits, batch)
        draws = [[uniform(seed, int(index), axis) for axis in range(logits.shape[1])] for index in batch.indices]
        normal = torch.special.ndtri(torch.tensor(draws, dtype=torch.float64).clamp_min(2.0**-54))
        return _one_pass((logits * normal.to(logits.device, logits.dtype)).sum(1))

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        """Give the pass of the similarity times its residual."""
        similarities = _similarities(logits, batch)
        return _one_pass((labels.to(logits.dtype) - similarities.detach()) * similarities)

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        return torch.cat(_of_pairs(outputs, batch), dim=1).float()

    def decision(self, logits: Tensor) -> Tensor:
        """Return the embeddings as they are: there is nothing to decide."""
        return logits

    def truth(self, examples: Sequence[Example]) -> Array:
        """Return the rows' similarities, (rows,), or zeros where rows have none."""
        if any(example.label is None for example in examples):
            return np.zeros(len(examples))
        return super().truth(examples)

    def metric(self, name: MetricName) -> Metric:
        if name == "retrieval_accuracy":
            return lambda labels, pairs: float((margins(pairs) >= -ROUNDING).mean())
        return lambda labels, pairs: metrics.SIMPLE[name](labels, similarities(pairs))

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        if name in RESAMPLED:
            return RESAMPLED[name](labels, [similarities(pairs) for pairs in predictions])
        right = np.stack([margins(pairs) >= -ROUNDING for pairs in predictions]).astype(float)
        return lambda counts: np.asarray(right @ counts / counts.sum(0))

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        pairs = self.predicted(logits)
        if name == "retrieval_accuracy":
            return float(scaled(torch.from_numpy(margins(pairs))).sigmoid().mean())
        return self.metric(name)(labels, pairs)


class _Evaluated(EmbeddingHead):
    """A metric takes labels of any scale."""

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        return Answers(None, label)


KIND = EmbeddingHead


def similarities(pairs: Array) -> Array:
    """Compute the similarity of the two embeddings of each row: (rows, 2 * width) to (rows,)."""
    first, second = np.split(pairs, 2, axis=1)
    return np.asarray((first * second).sum(1))


def margins(pairs: Array) -> Array:
    """Compute by how much each row's second text is more similar to its first than the best other row's, (rows,).

    One row alone has no other, and is ahead by infinity.
    """
    first, second = np.split(pairs, 2, axis=1)
    found = np.empty(len(pairs))
    for start in range(0, len(pairs), ROWS):
        block = np.arange(start, min(start + ROWS, len(pairs)))
        to_all = first[block] @ second.T
        own = to_all[np.arange(len(block)), block]
        to_all[np.arange(len(block)), block] = -np.inf
        found[block] = own - to_all.max(1)
    return found


def _of_pairs(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the embeddings of each row's first and second text, (rows, width) each."""
    if batch.rows is None:
        raise TypeError("the batch was read for rows of one text")
    first, second = outputs.view(len(batch), 2, -1).unbind(1)
    return first, second


def _similarities(outputs: Tensor, batch: Batch) -> Tensor:
    first, second = _of_pairs(outputs, batch)
    return (first * second).sum(1)


def _one_pass(sums: Tensor) -> Passes:
    return torch.ones(len(sums), 1, dtype=torch.float64, device=sums.device), [sums]
