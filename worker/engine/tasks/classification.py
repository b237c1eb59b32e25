"""A sequence has one of several labels: the likelihood is the softmax of the logits."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.contracts.prediction import MOST_LABELS, Answer, LabelAnswer
from worker.engine.catalog.tasks import Classification, MetricName
from worker.engine.inputs.examples import Batch, Example
from worker.engine.tasks import metrics
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import TINY, Combined, HeadKind, Passes, one_pass
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.smoothing import scaled

C = TypeVar("C", bound=Classification)


class ClassificationHead(HeadKind[C], Generic[C]):
    """Predictions are ids of classes."""

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the passes of `sum_y p_y d_y^2 - (sum_y p_y d_y)^2`, with `d_y` the derivative of `z_y`.

        By the law of total variance this is `sum_k p_k s_k+1 / s_k (d_k - m_k+1)^2`, label by label from the likeliest
        on, with `s_k` the sum of `p_k` and all after it and `m_k` their mean of `d`. K labels cost K - 1 backward
        passes on one graph.
        """
        weights, coefficients = contrasts(logits)
        return weights, Combined(logits, coefficients)

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        draws = torch.tensor([uniform(seed, int(i)) for i in batch.indices], dtype=torch.float64)
        return one_pass(logits, of_label(logits, drawn(logits, draws)))

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return one_pass(logits, of_label(logits, labels))

    def decision(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def answer(self, judged: Tensor) -> Answer:
        return self.label_answer(judged[0])

    def label_answer(self, logits: Tensor) -> LabelAnswer:
        """Return the answer by the logits of one output, (labels,), float64."""
        found = likeliest(logits.softmax(0), self.task.names)
        return LabelAnswer(label=next(iter(found)), probabilities=found)

    def metric(self, name: MetricName) -> Metric:
        """Return a metric. F1 is that of label 1 if there are two labels, and else the unweighted mean over labels."""
        if name == "f1":
            return metrics.f1("binary" if self.task.f1_is_of_one else "macro")
        return metrics.SIMPLE[name]

    def undefined(self, name: MetricName, labels: Array, source: str) -> str | None:
        if name == "f1" and self.task.f1_is_of_one and not labels.any():
            return f"no row of {source} has the label 1, so f1, which is of that label, is 0"
        return super().undefined(name, labels, source)

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        outputs = self.task.outputs
        return metrics.of_classes(name, labels, [metrics.indicator(classes, outputs) for classes in predictions])

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        is_of_class = smoothed_classes(logits)
        return float(metrics.of_classes(name, labels, [is_of_class.T])(np.ones((len(labels), 1)))[0, 0])

    def likely_permutation(self, labels: Array, predictions: Array) -> list[int] | None:
        return metrics.likely_permutation(labels, predictions, self.task.outputs)


KIND = ClassificationHead


def likeliest(probabilities: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the probabilities of labels, (labels,), by name, from the likeliest on, the first of equal ones first."""
    order = probabilities.sort(descending=True, stable=True).indices[:MOST_LABELS].tolist()
    return {names[index]: float(probabilities[index]) for index in order}


def smoothed_classes(logits: Tensor) -> Array:
    """Return the probability of each class of which a prediction is partly, (outputs, classes)."""
    decisive = logits.double()
    return np.asarray(scaled(decisive - decisive.mean(1, keepdim=True)).softmax(1))


def drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Draw labels from the model's distribution, (batch,), by numbers between 0 and 1, (batch,)."""
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    return (draws[:, None].to(cumulative.device) >= cumulative[:, :-1]).sum(-1)


def of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the derivative of each example's `log p` of its label by the logits: (batch, labels), float64."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1])
    return own - logits.detach().double().softmax(-1)


def contrasts(logits: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the weights of `ClassificationHead.expected`, (batch, passes), and each pass's coefficients of logits."""
    p, ranked = logits.detach().double().softmax(-1).sort(dim=-1, descending=True, stable=True)  # (batch, labels)
    sums = p.flip(-1).cumsum(-1).flip(-1)
    later = sums[:, 1:]
    weights = p[:, :-1] * later / sums[:, :-1].clamp_min(TINY)
    mean_of_later = p[:, None] / later.clamp_min(TINY)[:, :, None]  # (batch, labels - 1, labels)
    of_ranks = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:-1] - mean_of_later.triu(1)
    by_label = torch.zeros_like(of_ranks).scatter(-1, ranked[:, None].expand_as(of_ranks), of_ranks)
    return weights, by_label.unbind(1)
