"""Formulas of metrics, from scikit-learn and SciPy, and the same metrics on resampled rows."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from worker.engine.catalog.tasks import MetricName
from worker.engine.runtime.libraries import optimize, sk, sparse, stats

Array = NDArray[np.float64]
Metric = Callable[[Array, Array], float]
"""Computes a metric from labels and predictions, which have the same shape, (rows, …)."""
ResampledMetric = Callable[[Array], Array]
"""Computes each prediction's metric, (predictions, resamples), from each row's number of draws, (rows, resamples)."""

LOST_TO_CANCELLATION = 1e-6  # share of a sum of squares below which fewer than ten digits are left
SUSPICIOUS_GAIN = 0.1  # gain of accuracy
CHANCE_ERRORS = 3  # standard errors of a share, at most 1 / sqrt(rows) each, that renaming labels may gain by chance


def f1(average: Literal["binary", "macro", "micro"]) -> Metric:
    return lambda labels, predictions: float(sk.f1_score(labels, predictions, average=average, zero_division=0))


def _zero_for_constants(of: Metric) -> Metric:
    """Make a correlation 0 where labels or predictions do not vary: it is undefined, and nothing is predicted."""
    return lambda labels, predictions: (
        0.0 if np.ptp(labels) == 0 or np.ptp(predictions) == 0 else float(of(labels, predictions))
    )


SIMPLE: dict[MetricName, Metric] = {
    "accuracy": lambda labels, predictions: float(sk.accuracy_score(labels, predictions)),
    "matthews": _zero_for_constants(lambda labels, predictions: sk.matthews_corrcoef(labels, predictions)),
    "pearson": _zero_for_constants(lambda labels, predictions: stats.pearsonr(labels, predictions).statistic),
    "spearman": _zero_for_constants(lambda labels, predictions: stats.spearmanr(labels, predictions).statistic),
}

CORRELATIONS: tuple[MetricName, ...] = ("matthews", "pearson", "spearman")
"""Metrics that are not defined, and are 0, if the labels do not vary."""


def of_classes(name: MetricName, labels: Array, predictions: Sequence[Any]) -> ResampledMetric:
    """Compute accuracy, F1 or Matthews' correlation (Gorodkin 2004) from the confusion tables' diagonals and margins.

    Args:
        labels: (rows,).
        predictions: (classes, rows) each, 1 where the row is predicted to have the class, or a share of 1; dense or
            sparse.
    """
    classes = predictions[0].shape[0]
    of_labels = indicator(labels, classes)
    of_predictions = [sparse.csr_array(one) for one in predictions]
    of_hits = [one.multiply(of_labels).tocsr() for one in of_predictions]

    def values(counts: Array) -> Array:
        rows = counts.sum(0)
        found = []
        for hit, of_prediction in zip(of_hits, of_predictions, strict=True):
            hits = hit @ counts  # (classes, resamples), as the other two
            if name == "accuracy":
                found.append(hits.sum(0) / rows)
                continue
            labelled, predicted = of_labels @ counts, of_prediction @ counts
            if name == "f1":
                f1 = ratio(2 * hits, labelled + predicted)
                present = (labelled + predicted > 0).sum(0)  # the mean is over these alone, as in scikit-learn
                found.append(f1[1] if classes == 2 else f1.sum(0) / present)
            elif name == "matthews":
                covariance = hits.sum(0) * rows - (labelled * predicted).sum(0)
                variances = (rows**2 - (labelled**2).sum(0), rows**2 - (predicted**2).sum(0))
                found.append(_correlation(covariance, *variances))
            else:
                raise ValueError(f"{name} is no metric of classes")
        return np.stack(found)

    return values


def of_decisions(name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
    """Compute metrics of several labels: accuracy of whole rows, or F1 of all decisions together, from sums over rows.

    Args:
        labels, predictions: (rows, labels), 1 where the label applies, else 0; predictions may also be shares of 1.
    """

    def values(counts: Array) -> Array:
        found = []
        for predicted in predictions:
            if name == "accuracy":
                right = 1 - np.abs(predicted - labels)
                found.append(right.prod(1) @ counts / counts[:, 0].sum())
            elif name == "f1":
                found.append(ratio(2 * (predicted * labels).sum(1) @ counts, (predicted + labels).sum(1) @ counts))
            else:
                raise ValueError(f"{name} is no metric of several labels")
        return np.stack(found)

    return values


def resampled_pearson(labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
    """Compute correlations from sums of values, squares and products; where these cancel, from the drawn rows."""
    versions = np.stack([_standardised(values) for values in (labels, *predictions)])
    of_values, of_squares = sparse.csr_array(versions), sparse.csr_array(versions**2)
    of_products = sparse.csr_array(versions[0] * versions[1:])

    def values(counts: Array) -> Array:
        rows = counts[:, 0].sum()
        sums, squares = of_values @ counts, of_squares @ counts
        variances = np.maximum(squares - sums**2 / rows, 0)
        covariances = of_products @ counts - sums[0] * sums[1:] / rows
        found = _correlation(covariances, variances[0], variances[1:])
        cancelled = variances <= LOST_TO_CANCELLATION * squares
        for version, resample in np.argwhere(cancelled[0] | cancelled[1:]):
            drawn = np.repeat(np.arange(len(labels)), counts[:, resample].astype(int))
            found[version, resample] = SIMPLE["pearson"](labels[drawn], predictions[version][drawn])
        return found

    return values


def resampled_spearman(labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
    """Compute correlations of average ranks among the drawn rows, in whole numbers: twice the rank, less its mean."""
    codes = [np.unique(values, return_inverse=True)[1] for values in (labels, *predictions)]
    indicators = [indicator(of_rows, int(of_rows.max()) + 1) for of_rows in codes]

    def values(counts: Array) -> Array:
        of_labels, variance = _ranks(indicators[0] @ counts)
        weighted = counts * of_labels[codes[0]]
        found = []
        for indicator in indicators[1:]:
            ranks, own_variance = _ranks(indicator @ counts)
            covariance = np.einsum("vr,vr->r", indicator @ weighted, ranks)
            found.append(_correlation(covariance, variance, own_variance))
        return np.stack(found)

    return values


def _ranks(drawn: Array) -> tuple[Array, Array]:
    """Compute doubled centred ranks of distinct values, ascending, from numbers of draws; and their sum of squares."""
    through = np.cumsum(drawn, axis=0)
    ranks = 2 * through - drawn - through[-1]
    return ranks, np.einsum("vr,vr,vr->r", drawn, ranks, ranks)


def _correlation(covariance: Array, first_variance: Array, second_variance: Array) -> Array:
    return np.clip(ratio(covariance, np.sqrt(first_variance) * np.sqrt(second_variance)), -1, 1)


def ratio(numerator: Array, denominator: Array) -> Array:
    """Divide; the result is 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def indicator(codes: Array, kinds: int) -> Any:
    """Make (kinds, rows), 1 where the row has the kind. Its product with counts says how often each kind was drawn."""
    rows = np.arange(len(codes))
    return sparse.csr_array((np.ones(len(codes)), (codes.astype(int), rows)), shape=(kinds, len(codes)))


def _standardised(values: Array) -> Array:
    """Move and scale values to mean 0 and sizes of at most 1. Correlations stay the same, and no square overflows."""
    centred: Array = values - values.mean()
    return centred / (float(np.abs(centred).max()) or 1.0)


def likely_permutation(labels: Array, predictions: Array, outputs: int) -> list[int] | None:
    """Find for each label of the rows the class whose predictions match it best, one to one.

    The result is None unless this reading of labels raises accuracy by more than chance and by `SUSPICIOUS_GAIN`: then
    the ids probably mean other classes in the data set than in the model.
    """
    counts = np.zeros((outputs, outputs))
    np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    rows, classes = optimize.linear_sum_assignment(counts, maximize=True)
    gain = (counts[rows, classes].sum() - counts.trace()) / len(labels)
    return classes.tolist() if gain > max(SUSPICIOUS_GAIN, CHANCE_ERRORS / len(labels) ** 0.5) else None
