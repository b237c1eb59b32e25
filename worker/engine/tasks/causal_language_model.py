"""Texts of tokens, each predicted from those before it: the likelihood of a row is the product of its tokens'."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row, Text
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, Label, MetricName
from worker.engine.inputs.examples import Answers, Batch, Example
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import EstimatorName, HeadKind, Passes, ResolvedEstimator
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.next_tokens import OutputLayer, drawn, judged, log_likelihoods
from worker.engine.tasks.smoothing import scaled

CHOICES = {"choice_accuracy": False, "choice_accuracy_normalised": True}
"""Metrics of choices, and whether they go by the likelihood of a character."""
WRITTEN = "exact_match"
"""Metric of what the model writes."""
SOFTCAP = "final_logit_softcapping"
"""Configuration key of the bound of logits, which Gemma has (Gemma Team 2024, arXiv 2408.00118, section 2)."""


class CausalLanguageModelHead(HeadKind[CausalLanguageModel]):
    """The outputs of a model are its last hidden states; logits follow from them a few tokens at a time.

    The prediction of a row is what its metrics need, three numbers that are summed over rows. Here these are the sum of
    its labels' negative log-likelihoods, the number of labels that are likelier than any other token, and the number of
    labels. Further metrics read rows and run the model in ways of their own, see `evaluated`.
    """

    def evaluated(self, evaluation: EvaluationSpec) -> HeadKind[CausalLanguageModel]:
        """Return the head as a metric needs it, see `worker.engine.tasks.choices` and `generation`."""
        if evaluation.metric in CHOICES:
            from worker.engine.tasks.choices import Ranking  # here, because it is a kind of this head

            return Ranking(self.task, self.model, CHOICES[evaluation.metric])
        if evaluation.metric == WRITTEN:
            from worker.engine.tasks.generation import Writing  # here, because it is a kind of this head

            return Writing(self.task, self.model, evaluation)
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (3,)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the backbone, and return its last hidden states, (batch, tokens, width)."""
        hidden: Tensor = self._model.base_model(**inputs).last_hidden_state
        return hidden

    def whole(self, row: Row) -> Text:
        return row.text if row.target is None else f"{row.text}{row.target}"

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        """Return the positions whose next tokens are labels, and those tokens.

        Labels are all tokens but the first; where the row has a target, those from the first that has a part of it, and
        in conversations those that have a part of what the assistant says.
        """
        if encoding is None:
            raise InvalidDataset(source, "the checkpoint's tokenizer does not say which text a token is of")
        if row.predicted is not None:
            spans, tokens = row.predicted, encoding.offsets
            is_said = [any(start < last and end > first for first, last in spans) for start, end in tokens]
            places = [place for place in range(1, len(is_said)) if is_said[place]]
            if not places:
                raise InvalidDataset(source, "the chat template leaves no token that the assistant says", row.place)
            return Answers(tuple(place - 1 for place in places), tuple(encoding.ids[place] for place in places))
        first = 1
        if row.target is not None:
            ends = (end for _, end in encoding.offsets)
            first = max(1, next((place for place, end in enumerate(ends) if end > len(row.text)), len(encoding.ids)))
        if first >= len(encoding.ids):
            problem = "it has one token, and none that follows"
            if row.target is not None:
                problem = "no token is of its target; write what should follow, or leave the row out"
            raise InvalidDataset(source, problem, row.place)
        return Answers(tuple(range(first - 1, len(encoding.ids) - 1)), tuple(encoding.ids[first:]))

    def predictions_of(self, example: Example) -> int:
        return 1

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the estimator; its labels are drawn by default, given the tokens that the row itself has before."""
        if asked == "expected":
            raise ValueError("the expectation over all texts cannot be computed")
        return "sampled" if asked == "auto" else asked

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the mean over the labels of all rows."""
        return len(batch) / float(batch.required_positions.sum())

    def expected(self, outputs: Tensor, batch: Batch) -> Passes:
        raise ValueError("the expectation over all texts cannot be computed")

    def sampled(self, outputs: Tensor, batch: Batch, seed: int) -> Passes:
        """Differentiate the likelihood of tokens that are drawn from the model at every labelled position."""
        rows, tokens = (found.tolist() for found in batch.required_positions.nonzero(as_tuple=True))
        draws = torch.tensor(
            [uniform(seed, int(batch.indices[row]), token) for row, token in zip(rows, tokens, strict=True)],
            dtype=torch.float64,
        )
        return self._one_pass(outputs, batch, lambda p, chunk: drawn(p, draws[chunk]))

    def empirical(self, outputs: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return self._one_pass(outputs, batch, lambda _, chunk: labels[chunk])

    def _one_pass(self, outputs: Tensor, batch: Batch, labels: Any) -> Passes:
        positions = batch.required_positions
        found = log_likelihoods(outputs[positions], self._layer, labels)
        sums = torch.zeros(len(batch), dtype=torch.float64, device=outputs.device)
        sums = sums.index_add(0, positions.nonzero()[:, 0], found.double())
        return torch.ones(len(batch), 1, dtype=torch.float64, device=outputs.device), [sums]

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return what the metrics need of each row, (batch, 3), float64; see the class."""
        if batch.labels is None:
            raise TypeError("the batch was read without labels")
        positions = batch.required_positions
        likelihoods, is_right = judged(outputs[positions], self._layer, batch.labels)
        each = torch.stack([-likelihoods.double(), is_right.double(), torch.ones_like(likelihoods).double()], dim=1)
        found = torch.zeros(len(batch), 3, dtype=torch.float64, device=outputs.device)
        return found.index_add(0, positions.nonzero()[:, 0], each)

    def decision(self, logits: Tensor) -> Tensor:
        """Return the rows' sums as they are: there is nothing to decide."""
        return logits

    def truth(self, examples: Sequence[Example]) -> Array:
        """Return zeros, (rows,): a row's sums are of its own labels already."""
        return np.zeros(len(examples))

    def metric(self, name: MetricName) -> Metric:
        return lambda labels, sums: float(_metric(name, sums.sum(0)[:, None])[0])

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        return lambda counts: np.stack([_metric(name, sums.T @ counts) for sums in predictions])

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        """Return the metric itself, which likelihoods make smooth already; choices are partly right by margins."""
        if name in CHOICES:
            return float(scaled(logits[:, 1].double()).sigmoid().mean())
        return self.metric(name)(labels, self.predicted(logits))

    def answer_tokens(self, name: MetricName, predictions: Array) -> float | None:
        """Return the mean length of what the model wrote; None if the metric is of something else."""
        if name != WRITTEN:
            return None
        _, tokens, rows, _ = predictions.sum(0)
        return float(tokens / rows)

    def answers_fit(self, name: MetricName, predictions: Array) -> float | None:
        """Return the share of what the model wrote that has an answer; None if no pattern says what an answer is."""
        if name != WRITTEN:
            return None
        _, _, rows, fitting = predictions.sum(0)
        return None if np.isnan(fitting) else float(fitting / rows)

    @property
    def _model(self) -> Any:
        if self.model is None:
            raise TypeError("this head has no model to run")
        return self.model

    @property
    def _layer(self) -> OutputLayer:
        linear = self._model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{type(self._model).__name__} has no linear output layer")
        return OutputLayer(linear, getattr(self._model.config, SOFTCAP, None))


KIND = CausalLanguageModelHead


def _metric(name: MetricName, sums: Array) -> Array:
    """Compute a metric from sums over rows, (3, resamples), or (4, resamples) of what is written."""
    if name in CHOICES or name == WRITTEN:
        right, _, rows = sums[:3]
        return np.asarray(right / rows)
    losses, right, tokens = sums
    if name == "token_accuracy":
        return np.asarray(right / tokens)
    loss = np.asarray(losses / tokens)
    if name in ("loss", "perplexity"):
        return np.exp(loss) if name == "perplexity" else loss
    raise ValueError(f"{name} is no metric of language models")
