"""Numbers and tables as both pages, report and card, write them."""

from collections.abc import Sequence

from worker.engine.catalog.methods import PassthroughParameters
from worker.engine.catalog.report import MergeResult

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
]
ABOUT_METRICS = (
    "All versions predict the same rows. The plain average and the merge with kept head use the expert's head as it "
    "was; merged is the model as published here. Retention is merged over expert. Intervals are bootstrap percentile "
    "intervals over rows; for the difference, both versions are resampled together."
)
CANDIDATE_COLUMNS = ["candidate", "mean retention", "lowest retention", "behind the chosen (95 % interval)"]
ABOUT_CANDIDATES = (
    "Every candidate is its method's best trial, or was not searched for; all are evaluated on the same held-out rows, "
    "which the search has not seen."
)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def metric_rows(result: MergeResult) -> list[list[str]]:
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
            ]
        )
    return rows


def candidate_table(result: MergeResult) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the candidates' table: a column of each model's metric, on held-out rows."""
    candidates = result.candidates or []
    models = list(dict.fromkeys(name for candidate in candidates for name in candidate.metrics))
    rows = []
    for candidate in candidates:
        cells = [candidate.name + (" (chosen)" if candidate.chosen else "")]
        cells += [number(candidate.mean_retention, 3), number(candidate.min_retention, 3)]
        behind = None if candidate.chosen else candidate.behind
        cells.append(f"{behind.value:+.4f} ({behind.interval[0]:+.4f} to {behind.interval[1]:+.4f})" if behind else "-")
        for model in models:
            found = candidate.metrics.get(model)
            cells.append(f"{found.value:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})" if found else "-")
        rows.append(cells)
    return [*CANDIDATE_COLUMNS, *models], rows


SLICE_COLUMNS = ["layers here", "model", "its layers"]


def slice_rows(method: PassthroughParameters) -> list[list[str]]:
    rows, first = [], 0
    for part in method.slices:
        start, stop = part.layers
        rows.append([f"{first} to {first + stop - start - 1}", part.model, f"{start} to {stop - 1}"])
        first += stop - start
    return rows


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a sentence, not all of very many."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def size(count: int) -> str:
    """Bytes, in the largest unit that leaves a whole number."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= of:
            return f"{count / of:.3g} {unit}" if count < 1000 * of else f"{count / of:,.0f} {unit}"
    return f"{count} bytes"
