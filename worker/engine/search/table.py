"""Judges each candidate, on rows on which nothing was searched."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from worker.engine.catalog.contracts.report import Candidate, CandidateMetric, Difference, mean_and_least
from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.primitives.values import PerTensor
from worker.engine.evaluation.metrics import bootstrap, interval, metric_for
from worker.engine.search.trial_merges import ExpertOutputs
from worker.engine.tasks.metrics import Array


@dataclass(frozen=True)
class TableRow:
    """A backbone that could have been published, and the function that makes it."""

    name: str
    kind: Literal["method", "average", "task_arithmetic", "expert", "base"]
    method: MethodParameters | None
    weights: Mapping[str, PerTensor[float]]
    align_ridge: float
    trial: int | None
    judged: Callable[[], Mapping[str, Array]]
    """Computes every model's predictions for its held-out rows, by model."""


@dataclass(frozen=True)
class _Judged:
    """A line's metric of one model, and its retention on resampled rows, (resamples,), or None where it has none."""

    metric: CandidateMetric
    retentions: Array | None


def table(
    lines: Sequence[TableRow], experts: Sequence[ExpertOutputs], chosen: int, on_line: Callable[[], None]
) -> tuple[list[Candidate], list[str]]:
    """Compute every line's metrics and retention on the held-out rows; a model's resamples are the same for all lines.

    Args:
        chosen: number of the trial that is published.

    Returns:
        The table, and notes of baselines that are not in it because their numbers do not stay finite.
    """
    predictions: list[Mapping[str, Array]] = []
    made: list[TableRow] = []
    notes: list[str] = []
    for line in lines:
        try:
            predictions.append(line.judged())
            made.append(line)
        except NumericalError as failed:
            if line.kind == "method":
                raise
            notes.append(f"{line.name} is not in the table of auto: {failed.message}")
        on_line()
    lines = made
    by_model = {
        outputs.name: _judged(outputs, [of_line[outputs.name] for of_line in predictions]) for outputs in experts
    }
    [published] = [index for index, line in enumerate(lines) if line.trial == chosen]
    found = []
    for index, line in enumerate(lines):
        metrics = {name: of_lines[index].metric for name, of_lines in by_model.items()}
        mean_retention, min_retention = mean_and_least(metrics.values())
        found.append(
            Candidate(
                name=line.name,
                kind=line.kind,
                method=None if line.method is None else line.method.model_dump(mode="json"),
                weights=dict(line.weights),
                align_ridge=line.align_ridge if any(outputs.alignment for outputs in experts) else None,
                trial=line.trial,
                metrics=metrics,
                mean_retention=mean_retention,
                min_retention=min_retention,
                behind=_behind(list(by_model.values()), published, index),
                chosen=index == published,
            )
        )
    return found, notes


def _judged(outputs: ExpertOutputs, predictions: Sequence[Array]) -> list[_Judged]:
    kind, name, labels = outputs.kind, outputs.evaluation.metric, outputs.held_out_labels
    task = kind.task
    metric = metric_for(name, task)
    expert = metric(labels, outputs.held_out_predicted)
    resampled = bootstrap(
        name, task, labels, predictions, outputs.evaluation.seed, list(map(kind.predictions_of, outputs.held_out))
    )
    found = []
    for predicted, draws in zip(predictions, resampled, strict=True):
        value = metric(labels, predicted)
        kept = kind.retention(name, value, expert)
        judged = CandidateMetric(
            metric=name,
            value=value,
            interval=interval(draws),
            retention=kept,
            answer_tokens=kind.answer_tokens(name, predicted),
        )
        of_draws = None if kept is None else (expert / draws if name in task.minimised else draws / expert)
        found.append(_Judged(judged, of_draws))
    return found


def _behind(by_model: Sequence[Sequence[_Judged]], published: int, index: int) -> Difference | None:
    """Compute the mean retention of the published line minus that of another."""
    values, draws = [], []
    for of_lines in by_model:
        ours, theirs = of_lines[published], of_lines[index]
        if ours.retentions is not None and theirs.retentions is not None:
            values.append((ours.metric.retention or 0.0) - (theirs.metric.retention or 0.0))
            draws.append(ours.retentions - theirs.retentions)
    if not values:
        return None
    return Difference(value=sum(values) / len(values), interval=interval(np.mean(draws, axis=0)))
