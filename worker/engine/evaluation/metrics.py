"""Metrics, from scikit-learn and SciPy, and their bootstrap intervals."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from sklearn import metrics as sk

from worker.engine.catalog.labels import Task
from worker.engine.catalog.spec import MetricName

Array = NDArray[np.float64]
Metric = Callable[[Array, Array], float]
"""From labels and predictions, each (rows,), to the metric."""

BOOTSTRAP_RESAMPLES = 1000
SUSPICIOUS_GAIN = 0.1  # of accuracy
CHANCE_ERRORS = 3  # standard errors of a share, at most 1 / sqrt(rows) each, that renaming labels may gain by chance


def _f1(average: Literal["binary", "macro"]) -> Metric:
    return lambda labels, predictions: float(sk.f1_score(labels, predictions, average=average, zero_division=0))


def _zero_for_constants(of: Metric) -> Metric:
    """Correlations are undefined where labels or predictions do not vary; nothing is predicted then."""
    return lambda labels, predictions: (
        0.0 if np.ptp(labels) == 0 or np.ptp(predictions) == 0 else float(of(labels, predictions))
    )


_SIMPLE: dict[MetricName, Metric] = {
    "accuracy": lambda labels, predictions: float(sk.accuracy_score(labels, predictions)),
    "matthews": _zero_for_constants(sk.matthews_corrcoef),
    "pearson": _zero_for_constants(lambda labels, predictions: stats.pearsonr(labels, predictions).statistic),
    "spearman": _zero_for_constants(lambda labels, predictions: stats.spearmanr(labels, predictions).statistic),
}


def metric_for(name: MetricName, task: Task) -> Metric:
    """The metric of a head's task; f1 is of label 1 with two labels, the unweighted mean over labels with more."""
    if name == "f1":
        return _f1("binary" if task.outputs == 2 else "macro")
    return _SIMPLE[name]


def interval(metric: Metric, labels: Array, predictions: Array, seed: int) -> tuple[float, float]:
    """95 % bootstrap percentile interval of a metric, resampling rows."""
    if len(labels) < 2:
        value = metric(labels, predictions)
        return value, value
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        values.append(metric(labels[rows], predictions[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def likely_permutation(labels: Array, predictions: Array, outputs: int) -> list[int] | None:
    """For each label of the rows, the class whose predictions match it best, one to one.

    None unless reading the labels so raises accuracy by more than chance and by `SUSPICIOUS_GAIN`: then the ids
    probably mean other things in the data set than in the model.
    """
    counts = np.zeros((outputs, outputs))
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    rows, classes = optimize.linear_sum_assignment(counts, maximize=True)
    gain = (counts[rows, classes].sum() - counts.trace()) / len(labels)
    return classes.tolist() if gain > max(SUSPICIOUS_GAIN, CHANCE_ERRORS / len(labels) ** 0.5) else None
