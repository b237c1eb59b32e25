"""Pictures of what a merge kept: every version of a model, and the candidates of a search."""

from collections.abc import Mapping

from markupsafe import Markup

from worker.engine.catalog.contracts.report import MergeResult, MetricResult, Version
from worker.engine.catalog.drawing.charts import (
    Bar,
    DotRow,
    Scale,
    bars,
    dots,
    key,
)
from worker.engine.catalog.drawing.html import element, table
from worker.engine.reporting.words import (
    about_candidates,
    candidate_remarks,
    candidate_table,
    listed,
    number,
)

MOST_DOTTED = 12  # number of models that a row of dots tells apart
MOST_LETTERS = 36  # letters of a name above a line, for which a phone has room
VERSIONS: dict[Version, str] = {
    "base": "base",
    "expert": "expert",
    "best_expert": "best expert",
    "average": "plain average",
    "merged_kept_head": "kept head",
    "merged": "merged",
}


def versions(metrics: Mapping[str, MetricResult]) -> Markup:
    """Draw bars of every version, by model. Bars of one metric have one scale, from 0 to 1 or as far as they go."""
    ends: dict[str, list[float]] = {}
    for m in metrics.values():
        drawn = (value for version in VERSIONS if (value := m.value_of(version)) is not None)
        ends.setdefault(m.metric, []).extend([*drawn, *(end for interval in m.intervals.values() for end in interval)])
    cards = []
    for index, (name, m) in enumerate(metrics.items()):
        values = {version: value for version in VERSIONS if (value := m.value_of(version)) is not None}
        rows = [
            Bar(VERSIONS[v], value, f"{value:.3f}", m.intervals.get(v), strong=v == "merged")
            for v, value in values.items()
        ]
        said = "; ".join(f"{row.label} {row.written}" for row in rows)
        kept = f"{100 * m.retention:.1f} % kept" if m.retention is not None else "no retention"
        title = f"{m.metric} of {name} by version"
        low, high = min(0.0, *ends[m.metric]), max(1.0, *ends[m.metric])
        picture = bars(f"kept-{index}", title, f"{said}. Lines are 95 % intervals.", rows, low=low, high=high)
        head = element("h3", element("span", name), element("span", f"{m.metric}, {kept}"))
        cards.append(element("div", head, picture, class_="card"))
    return element("div", cards, class_="cards")


def candidates(result: MergeResult) -> list[Markup]:
    """Draw the retentions that each candidate of a search has on held-out rows."""
    if not result.candidates:
        return []
    known = [c for c in result.candidates if c.mean_retention is not None]
    models = list(dict.fromkeys(name for c in known for name in c.metrics))
    told_apart = len(models) <= MOST_DOTTED
    rows = []
    for c in known:
        of_models = {name: m.retention for name, m in c.metrics.items() if m.retention is not None}
        shown = [(models.index(name), value) for name, value in of_models.items()] if told_apart else []
        spread = (min(of_models.values()), max(of_models.values())) if of_models else None
        name = c.name if len(c.name) <= MOST_LETTERS else f"{c.name[: MOST_LETTERS - 1]}…"
        label = f"{name}: {number(c.mean_retention, 3)}" + (", chosen" if c.chosen else "")
        rows.append(DotRow(label, shown, c.mean_retention, spread, strong=c.chosen))
    columns, cells = candidate_table(result)
    parts = [element("p", remark) for remark in candidate_remarks(result)]
    parts.append(element("p", about_candidates(result.candidates), class_="note"))
    if rows:
        ends = [end for row in rows if row.spread for end in row.spread]
        floors = result.search.min_retention if result.search else {}
        scale = Scale.around([*ends, *floors.values()], least=0.02)
        said = "; ".join(row.label for row in rows)
        limits = sorted({*floors.values()})
        parts.append(
            dots("candidates-p", "Retention of each candidate", f"Mean retentions: {said}.", rows, scale, limits)
        )
        marks = [(index, name) for index, name in enumerate(models)] if told_apart else []
        what = "Dots are" if told_apart else "Lines go from the least to the largest of"
        note = f"{what} the models' retentions, the upright line is their mean.{_floors(floors)}"
        parts.append(element("p", note, class_="note"))
        parts.append(key(marks) if marks else Markup(""))
    marked = [
        [element("span", row[0], class_="chosen") if c.chosen else row[0], *row[1:]]
        for c, row in zip(result.candidates, cells, strict=True)
    ]
    return [*parts, table(columns, marked, "Candidates on held-out rows", numeric=range(1, len(columns)))]


def _floors(floors: Mapping[str, float]) -> str:
    """Say which limit belongs to which model."""
    by_value: dict[float, list[str]] = {}
    for name, value in floors.items():
        by_value.setdefault(value, []).append(name)
    whose = "; ".join(f"{value:g} of {listed(names)}" for value, names in sorted(by_value.items()))
    return f" Dashed lines are floors: {whose}." if whose else ""
