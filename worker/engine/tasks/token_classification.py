"""Each word of a sequence has one of several labels: the likelihood is the product of those of the words.

A word's label is that of its first token, as in transformers; its other tokens have none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.contracts.prediction import Answer, WordsAnswer
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import Label, MetricName, TokenClassification
from worker.engine.inputs.examples import Answers, Batch, Example
from worker.engine.tasks.classification import ClassificationHead, contrasts, drawn, of_label, smoothed_classes
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.entities import entity_f1, expected_entity_f1, is_any_entity, resampled_entity_f1
from worker.engine.tasks.kind import EstimatorName, Passes, ResolvedEstimator, combined, one_pass
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric


class TokenClassificationHead(ClassificationHead[TokenClassification]):
    """Predictions are ids of classes, one for each word that has tokens within the limit of length."""

    tokenizer_arguments: Mapping[str, Any] = {"is_split_into_words": True}

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        if encoding is None:
            raise InvalidDataset(source, "the checkpoint's tokenizer does not say which word a token is of")
        first: dict[int, int] = {}
        for position, word in enumerate(encoding.word_ids):
            if word is not None:
                first.setdefault(word, position)
        if not first:
            raise InvalidDataset(source, "no token is of a word", row.place)
        positions = tuple(first.values())
        if not isinstance(label, tuple):
            return Answers(positions, None)
        if len(label) != len(row.text):
            raise InvalidDataset(source, f"{len(row.text)} words have {len(label)} labels", row.place)
        return Answers(positions, tuple(label[word] for word in first))

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the estimator; labels are drawn by default, since the expectation takes several passes a word."""
        return "sampled" if asked == "auto" else super().estimator(asked)

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the mean over the words of all rows."""
        return len(batch) / float(batch.required_positions.sum())

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the passes of the sum over words of each one's expectation: given the row, words are independent.

        They differentiate one contrast of one word each.
        """
        positions = batch.required_positions
        of_words, by_pass = contrasts(batch.of_outputs(logits))  # (words, passes), and (words, labels) each
        rows, tokens = positions.nonzero(as_tuple=True)
        nth = (positions.cumsum(1) - 1)[rows, tokens]  # the word's number in its row
        words, passes = int(nth.max()) + 1, of_words.shape[1]
        weights = of_words.new_zeros(len(logits), words, passes)
        weights[rows, nth] = of_words

        def made(index: int) -> Tensor:
            word, number = divmod(index, passes)
            chosen = nth == word
            coefficients = torch.zeros_like(logits, dtype=torch.float64)
            coefficients[rows[chosen], tokens[chosen]] = by_pass[number][chosen]
            return combined(logits, coefficients)

        return weights.flatten(1), _Made(words * passes, made)

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        rows, tokens = (found.tolist() for found in batch.required_positions.nonzero(as_tuple=True))
        draws = [uniform(seed, int(batch.indices[row]), token) for row, token in zip(rows, tokens, strict=True)]
        return self._one_pass(logits, batch, drawn(batch.of_outputs(logits), torch.tensor(draws, dtype=torch.float64)))

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return self._one_pass(logits, batch, labels)

    def _one_pass(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        coefficients = torch.zeros_like(logits, dtype=torch.float64)
        coefficients[batch.required_positions] = of_label(batch.of_outputs(logits), labels)
        return one_pass(logits, coefficients)

    def truth(self, examples: Sequence[Example]) -> Array:
        """Return each word's label, and whether the word is its row's first: (words, 2)."""
        first = [place == 0 for example in examples for place in range(example.outputs)]
        return np.stack([super().truth(examples), np.array(first, dtype=np.float64)], axis=1)

    def answer(self, judged: Tensor) -> Answer:
        return WordsAnswer(words=[self.label_answer(logits) for logits in judged])

    def metric(self, name: MetricName) -> Metric:
        """Return a metric of words, as of rows in classification, or F1 of entities."""
        if name == "entity_f1":
            return lambda labels, predictions: entity_f1(self.task, labels, predictions)
        of_words = super().metric(name)
        return lambda labels, predictions: of_words(labels[:, 0], predictions)

    def undefined(self, name: MetricName, labels: Array, source: str) -> str | None:
        if name == "entity_f1":
            return None if is_any_entity(self.task, labels) else f"no row of {source} has an entity, so entity_f1 is 0"
        return super().undefined(name, labels[:, 0], source)

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        if name == "entity_f1":
            return resampled_entity_f1(self.task, labels, predictions)
        return super().resampled(name, labels[:, 0], predictions)

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        if name == "entity_f1":
            return expected_entity_f1(self.task, labels, smoothed_classes(logits))
        return super().smoothed(name, labels[:, 0], logits)

    def likely_permutation(self, labels: Array, predictions: Array) -> list[int] | None:
        return super().likely_permutation(labels[:, 0], predictions)


KIND = TokenClassificationHead


class _Made(Sequence[Tensor]):
    """Sums that are made when they are asked for: there are several for each word."""

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._make(index) if isinstance(index, int) else [self._make(i) for i in range(self._count)[index]]
