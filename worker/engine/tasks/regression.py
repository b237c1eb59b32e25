"""A sequence has a number: the likelihood is a Gaussian of unit variance around the prediction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.catalog.contracts.prediction import Answer, ValueAnswer
from worker.engine.catalog.tasks import MetricName, Regression
from worker.engine.inputs.examples import Batch, Example
from worker.engine.tasks import metrics
from worker.engine.tasks.kind import EstimatorName, HeadKind, Passes, ResolvedEstimator, one_pass
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric

RESAMPLED = {"pearson": metrics.resampled_pearson, "spearman": metrics.resampled_spearman}


class RegressionHead(HeadKind[Regression]):
    """Predictions are numbers."""

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the squared error, twice the Gaussian's."""
        return 2.0

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the expectation over the Gaussian, unless the row's own residual is asked for."""
        return "empirical" if asked == "empirical" else "expected"

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        """Give the pass of the prediction's own squared derivative."""
        return one_pass(logits, torch.ones_like(logits, dtype=torch.float64))

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        return self.expected(logits, batch)

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return one_pass(logits, labels.double()[:, None] - logits.detach().double())

    def decision(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def answer(self, judged: Tensor) -> Answer:
        return ValueAnswer(value=float(judged[0, 0]))

    def metric(self, name: MetricName) -> Metric:
        return metrics.SIMPLE[name]

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        return RESAMPLED[name](labels, predictions)

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        return self.metric(name)(labels, self.predicted(logits))


KIND = RegressionHead
