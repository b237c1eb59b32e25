"""Metrics, from scikit-learn and SciPy, and their bootstrap intervals."""

import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from worker.engine.catalog.labels import Task
from worker.engine.catalog.spec import MetricName

Array = NDArray[np.float64]
Metric = Callable[[Array, Array], float]
"""From labels and predictions, each (rows,), to the metric."""

BOOTSTRAP_RESAMPLES = 1000


def _f1(average: Literal["binary", "macro"]) -> Metric:
    return lambda labels, predictions: float(sk.f1_score(labels, predictions, average=average, zero_division=0))


def _correlation(of: Callable[[Array, Array], tuple[float, float]]) -> Metric:
    def metric(labels: Array, predictions: Array) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0  # undefined for a constant; nothing is predicted then
        return float(of(labels, predictions)[0])

    return metric


_SIMPLE: dict[MetricName, Metric] = {
    "accuracy": lambda labels, predictions: float(sk.accuracy_score(labels, predictions)),
    "matthews": lambda labels, predictions: float(sk.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample may miss a label; its value is right nevertheless
        values = []
        for _ in range(BOOTSTRAP_RESAMPLES):
            rows = rng.integers(0, len(labels), len(labels))
            values.append(metric(labels[rows], predictions[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
