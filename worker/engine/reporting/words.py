"""Formats numbers and tables for both report and card."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker.engine.catalog.contracts.report import Candidate, MergeResult, MetricResult
from worker.engine.catalog.primitives.slices import Slice

METRIC_COLUMNS = [
    "model",
    "metric",
    "expert",
    "plain average",
    "merged, kept head",
    "merged (95 % interval)",
    "merged minus average (95 % interval)",
    "retention",
    "rows",
    "base",
    "best expert",
    "tokens written",
]
ABOUT_METRICS = (
    "All versions predict the same rows. Where models keep their heads, the plain average and the merge with kept head "
    "use the expert's head as it was. Merged is the model as published here. Retention is merged over expert, or "
    "expert over merged where less is better (loss, perplexity). Intervals are bootstrap percentile intervals over "
    "rows; for the difference, both versions are resampled together."
)
CANDIDATE_COLUMNS = ["candidate", "mean retention", "lowest retention", "behind the chosen (95 % interval)"]
ABOUT_CANDIDATES = (
    "Every method stands here with its best trial, in the order of what they kept on the search rows; what was given "
    "up early was behind on the first of these. Plain merges, experts and base were not searched for. All are "
    "evaluated on the same held-out rows, which the search has not seen{heads}. "
    "Behind the chosen is its mean retention minus that of the line: less than 0 where the line keeps more."
)
ALIGNED = (
    ", with heads aligned to each, to the plain average too; where it is compared as one of the versions, it keeps the "
    "experts' heads"
)
MOST_WEIGHTS = 8  # number of weights in a sentence; report.json has all


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def metric_table(result: MergeResult) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the metrics' table, without columns in which nothing is known of any model."""
    rows = _metric_rows(result)
    known = [place for place in range(len(METRIC_COLUMNS)) if any(row[place] != "-" for row in rows)]
    return [METRIC_COLUMNS[place] for place in known], [[row[place] for place in known] for row in rows]


def _lengths(metric: MetricResult) -> str:
    if metric.answer_tokens is None:
        return "-"
    return f"{metric.answer_tokens['merged']:.1f}, expert {metric.answer_tokens['expert']:.1f}"


def _metric_rows(result: MergeResult) -> list[list[str]]:
    rows = []
    for name, m in (result.metrics or {}).items():
        gain = m.differences["average"]
        rows.append(
            [
                name,
                m.metric,
                number(m.expert),
                number(m.average),
                number(m.merged_kept_head),
                f"{m.merged:.4f} ({m.interval[0]:.4f} to {m.interval[1]:.4f})",
                f"{gain.value:+z.4f} ({gain.interval[0]:+z.4f} to {gain.interval[1]:+z.4f})",
                number(m.retention, 3),
                str(m.examples),
                number(m.base),
                f"{m.best_expert.value:.4f} ({m.best_expert.name})" if m.best_expert else "-",
                _lengths(m),
            ]
        )
    return rows


def candidate_table(result: MergeResult) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the candidates' table.

    It has a column for each model's metric on held-out rows, and, where models write answers, for their lengths.
    """
    candidates = result.candidates or []
    models = {name: found.metric for candidate in candidates for name, found in candidate.metrics.items()}
    writing = [name for name in models if any(c.metrics[name].answer_tokens is not None for c in candidates)]
    given_up = {trial.number for trial in result.search.trials if trial.pruned} if result.search else set()
    rows = []
    for candidate in candidates:
        early = candidate.trial in given_up
        cells = [candidate.name + (" (chosen)" if candidate.chosen else " (given up early)" if early else "")]
        cells += [number(candidate.mean_retention, 3), number(candidate.min_retention, 3)]
        behind = None if candidate.chosen else candidate.behind
        cells.append(f"{behind.value:+.4f} ({behind.interval[0]:+.4f} to {behind.interval[1]:+.4f})" if behind else "-")
        for model in models:
            found = candidate.metrics.get(model)
            cells.append(f"{found.value:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})" if found else "-")
        cells += [number(candidate.metrics[model].answer_tokens, 1) for model in writing if model in candidate.metrics]
        rows.append(cells)
    columns = [*CANDIDATE_COLUMNS, *(f"{name}, {metric}" for name, metric in models.items())]
    return [*columns, *(f"{name}, tokens written" for name in writing)], rows


def about_candidates(candidates: Sequence[Candidate]) -> str:
    return ABOUT_CANDIDATES.format(heads="" if all(c.align_ridge is None for c in candidates) else ALIGNED)


def candidate_remarks(result: MergeResult) -> list[str]:
    """Say which candidate was chosen, and remark on the table."""
    candidates = result.candidates or []
    chosen = next((candidate for candidate in candidates if candidate.chosen), None)
    if chosen is None or result.search is None:
        return []
    trial = result.search.best
    own = {name: v for name, v in trial.parameters.items() if name not in {"align_ridge", *_weights(chosen)}}
    settings = {**own, **(_weights(chosen) if len(chosen.weights) <= MOST_WEIGHTS else {})}
    if chosen.align_ridge is not None:
        settings["align_ridge"] = chosen.align_ridge
    coefficients = f" with {settings_of(settings)}" if settings else ""
    return [f"Chosen is trial {trial.number}: {chosen.name}{coefficients}."]


def _weights(candidate: Candidate) -> dict[str, Any]:
    return {f"weight {name}": weight for name, weight in candidate.model_dump(mode="json")["weights"].items()}


def settings_of(values: Mapping[str, Any]) -> str:
    text = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {json.dumps(value, ensure_ascii=False)}"
        for name, value in values.items()
    )
    return text if len(text) <= 300 else text[:299] + "…"


SLICE_COLUMNS = ["layers here", "model", "its layers"]


def slice_rows(slices: Sequence[Slice]) -> list[list[str]]:
    rows, first = [], 0
    if any(part.layers is None for part in slices):
        return [["", part.model, "all" if part.layers is None else "{} to {}".format(*part.layers)] for part in slices]
    for part in slices:
        start, stop = part.layers or (0, 0)
        rows.append([f"{first} to {first + stop - start - 1}", part.model, f"{start} to {stop - 1}"])
        first += stop - start
    return rows


def listed(names: Sequence[str], most: int = 5) -> str:
    """List names in a sentence, but not all if there are very many."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def size(count: int) -> str:
    """Format bytes in the largest unit that leaves a whole number."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= of:
            return f"{count / of:.3g} {unit}" if count < 1000 * of else f"{count / of:,.0f} {unit}"
    return f"{count} bytes"
