"""Labels apply independently of each other: the likelihood of each is the sigmoid of its logit."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.contracts.prediction import Answer, LabelsAnswer
from worker.engine.catalog.tasks import MetricName, MultiLabel
from worker.engine.inputs.examples import Batch, Example
from worker.engine.tasks import metrics
from worker.engine.tasks.classification import likeliest
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import Combined, HeadKind, Passes, one_pass
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.smoothing import scaled


class MultiLabelHead(HeadKind[MultiLabel]):
    """Predictions are 1 for each label that is more likely than not to apply, else 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.task.outputs,)

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the mean over labels."""
        return 1 / self.task.outputs

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the passes of `sum_k p_k (1 - p_k) d_k^2`. K labels cost K backward passes on one graph."""
        z = logits.detach().double()
        each = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
        return z.sigmoid() * (-z).sigmoid(), Combined(logits, each.unbind(1))  # 1 - p without cancellation

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        """Draw for each label by itself whether it applies."""
        p = logits.detach().double().sigmoid()
        draws = [[uniform(seed, int(i), label) for label in range(p.shape[1])] for i in batch.indices]
        applies = torch.tensor(draws, dtype=torch.float64).to(p.device) < p
        return one_pass(logits, applies.double() - p)

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return one_pass(logits, labels.double() - logits.detach().double().sigmoid())

    def decision(self, logits: Tensor) -> Tensor:
        return logits > 0

    def answer(self, judged: Tensor) -> Answer:
        [logits] = judged
        names = [name for name, applies in zip(self.task.names, self.decision(logits).tolist(), strict=True) if applies]
        return LabelsAnswer(labels=names, probabilities=likeliest(logits.sigmoid(), self.task.names))

    def metric(self, name: MetricName) -> Metric:
        """Return a metric. F1 is that of all decisions together; accuracy is the share of rows that are all right."""
        return metrics.f1("micro") if name == "f1" else metrics.SIMPLE[name]

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        return metrics.of_decisions(name, labels, predictions)

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        applies = scaled(logits.double()).sigmoid().numpy()
        return float(metrics.of_decisions(name, labels, [applies])(np.ones((len(labels), 1)))[0, 0])


KIND = MultiLabelHead
