"""Metrics, from scikit-learn and SciPy, and their paired bootstrap over several predictions of the same rows."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from worker.engine.catalog.contracts.report import BestExpert, Difference, MetricResult, Version
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.tasks import MetricName, Task
from worker.engine.tasks import kind_of
from worker.engine.tasks.metrics import Array, Metric

BOOTSTRAP_RESAMPLES = 1000
CHUNK_VALUES = 2**17  # number of counts of rows at a time, 1 MiB: values computed from them stay in a core's cache


def metric_for(name: MetricName, task: Task) -> Metric:
    """Return the metric of this name for a head's task."""
    return kind_of(task).metric(name)


def compare(
    evaluation: EvaluationSpec,
    task: Task,
    labels: Array,
    predictions: Mapping[Version, Array],
    outputs: Sequence[int] | None = None,
    best_expert: str | None = None,
) -> MetricResult:
    """Compute the metric of every version's predictions, and the merge's difference from each other version.

    Intervals are 95 % bootstrap percentile intervals (Efron and Tibshirani 1993, chapter 13). The bootstrap is paired:
    each resample draws the same rows for all versions, so that the difficulty of rows cancels in differences.

    Args:
        evaluation: names the metric; its seed draws the rows.
        labels: (outputs,), or for a multi-label head (outputs, labels).
        predictions: predictions of all versions, in the same shape.
        outputs: number of outputs of each row; None: each row has one.
        best_expert: name of the expert whose predictions are those of the version `best_expert`.

    Raises:
        NumericalError: a metric is not finite.
    """
    metric = metric_for(evaluation.metric, task)
    values = {version: metric(labels, predicted) for version, predicted in predictions.items()}
    if not all(map(math.isfinite, values.values())):
        raise NumericalError(f"{evaluation.metric} of {evaluation.source} is not finite; are its labels too large?")
    draws = bootstrap(evaluation.metric, task, labels, list(predictions.values()), evaluation.seed, outputs)
    resampled = dict(zip(predictions, draws, strict=True))
    kind = kind_of(task)
    lengths = {version: kind.answer_tokens(evaluation.metric, predicted) for version, predicted in predictions.items()}
    fitting = {version: kind.answers_fit(evaluation.metric, predicted) for version, predicted in predictions.items()}
    return MetricResult(
        metric=evaluation.metric,
        examples=len(labels if outputs is None else outputs),
        expert=values["expert"],
        average=values["average"],
        merged=values["merged"],
        merged_kept_head=values.get("merged_kept_head"),
        retention=kind.retention(evaluation.metric, values["merged"], values["expert"]),
        interval=interval(resampled["merged"]),
        intervals={version: interval(resampled[version]) for version in predictions},
        base=values.get("base"),
        best_expert=None if best_expert is None else BestExpert(name=best_expert, value=values["best_expert"]),
        answer_tokens={version: tokens for version, tokens in lengths.items() if tokens is not None} or None,
        answers_fit={version: share for version, share in fitting.items() if share is not None} or None,
        differences={
            version: Difference(
                value=values["merged"] - values[version],
                interval=interval(resampled["merged"] - resampled[version]),
            )
            for version in predictions
            if version != "merged"
        },
    )


def interval(resampled: Array) -> tuple[float, float]:
    """Return the 95 % percentile interval."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(
    name: MetricName,
    task: Task,
    labels: Array,
    predictions: Sequence[Array],
    seed: int,
    outputs: Sequence[int] | None = None,
) -> Array:
    """Compute every prediction's metric on the same resampled rows, (predictions, resamples).

    Args:
        labels, predictions: (outputs,) each, or for a multi-label head (outputs, labels).
        outputs: number of outputs of each row, all of which are drawn together; None: each row has one.
    """
    metric = kind_of(task).resampled(name, labels, predictions)
    if outputs is None or set(outputs) == {1}:
        return np.concatenate([metric(counts) for counts in _resamples(len(labels), seed)], axis=1)
    drawn = (np.repeat(counts, outputs, axis=0) for counts in _resamples(len(outputs), seed))
    return np.concatenate([metric(counts) for counts in drawn], axis=1)


def _resamples(rows: int, seed: int) -> Iterator[Array]:
    """Yield how often each row is drawn, (rows, resamples), a chunk of resamples at a time."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_VALUES // rows)
    for start in range(0, BOOTSTRAP_RESAMPLES, chunk):
        size = min(chunk, BOOTSTRAP_RESAMPLES - start)
        counts = np.empty((rows, size))
        for resample in range(size):
            counts[:, resample] = np.bincount(rng.integers(0, rows, rows), minlength=rows)
        yield counts
