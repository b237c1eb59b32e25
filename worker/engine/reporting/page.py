"""`report.html`: one file without scripts that loads nothing else, and begins with a user's first question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from worker.engine.catalog.contracts.report import PAGE_POLICY, JobResult, MergeResult, ScoreResult
from worker.engine.catalog.contracts.spec import JobSpec, MergeSpec, ScoreSpec
from worker.engine.catalog.drawing.html import Cell, details, element, environment, markup, table
from worker.engine.catalog.drawing.style import STYLE
from worker.engine.catalog.families import NODE_KINDS
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.reporting.contents import Construction, Contents
from worker.engine.reporting.figures.certainty import certainty
from worker.engine.reporting.figures.comparisons import candidates, versions
from worker.engine.reporting.figures.interference import interference
from worker.engine.reporting.figures.maps import scores, weights
from worker.engine.reporting.figures.search import search
from worker.engine.reporting.figures.timings import timings
from worker.engine.reporting.words import (
    ABOUT_METRICS,
    SLICE_COLUMNS,
    listed,
    metric_table,
    number,
    size,
    slice_rows,
)

NOT_KNOWN_YET = {"queue_seconds", "publish_seconds"}  # unknown while the report is written; the job's result has them
MOST_RECIPE_LETTERS = 100_000
TEMPLATES = environment(Path(__file__).parent / "templates")
HEADS = {
    "merged": "merged with the backbone",
    "aligned": "each model's own, refitted to the merged backbone",
    "kept": "each model's own, as it was",
}


@dataclass(frozen=True)
class Section:
    name: str
    """Name in links to the section, one word."""
    title: str
    content: Sequence[Markup | None]

    @property
    def markup(self) -> Markup:
        return markup(self.content)


def merge_page(spec: MergeSpec, plan: MergePlan, result: MergeResult, contents: Contents, base: str | None) -> str:
    """Make the page of a merge. `base` is the digest of the plan's base."""
    sections = [
        _notes(result),
        Section("retention", "What the merge kept of each expert", _retention(result)),
        Section("candidates", "What could have been published", candidates(result)),
        Section("search", "How it was found", search(result)),
        Section("merged", "What was merged", _merged(spec, plan, result, contents, base)),
        Section("scores", "Where each model's nodes matter", scores(contents.maps)),
        Section("weights", "Which model decides where", weights(contents.maps)),
        Section("interference", "How the models get in each other's way", interference(contents.interference)),
        Section("certainty", "How well the merge weights are known", certainty(result.stopping)),
        Section("run", "Where the time went", _run(result, contents)),
        _repeat(spec, result, "/merge"),
    ]
    tiles = [
        ("mean retention", _share(result.mean_retention), "of the experts' metrics"),
        ("lowest retention", _share(result.min_retention), _lowest(result)),
        ("accepted", _accepted(result), "whether it reaches what is asked for"),
        *_common_tiles(spec, result),
    ]
    return _page(spec, "Merge", _summary(spec, result), tiles, sections)


def score_page(spec: ScoreSpec, result: ScoreResult, contents: Contents) -> str:
    sections = [
        _notes(result),
        Section("measured", "What was measured", _measured(result)),
        Section("scores", "Where each model's nodes matter", scores(contents.maps)),
        Section(
            "certainty",
            "How well merge weights would be known",
            [part for i, m in enumerate(result.models) for part in certainty(m.stopping, m.name, i)],
        ),
        Section("store", "What is kept for later jobs", _kept(result)),
        Section("run", "Where the time went", _run(result, contents)),
        _repeat(spec, result, "/scores"),
    ]
    lead = f"Statistics of {listed([m.name for m in result.models])} for {result.method['name']}, without a merge."
    return _page(spec, "Score", lead, _common_tiles(spec, result), sections)


def _page(
    spec: JobSpec, kind: str, lead: str, tiles: Sequence[tuple[str, str | None, str]], sections: Sequence[Section]
) -> str:
    page = TEMPLATES.get_template("page.html").render(
        policy=PAGE_POLICY,
        style=STYLE,
        name=spec.name,
        kind=kind,
        lead=lead,
        tiles=[tile for tile in tiles if tile[1] is not None],
        sections=[section for section in sections if any(section.content)],
    )
    return f"{page}\n"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _lowest(result: MergeResult) -> str:
    known = {name: m.retention for name, m in (result.metrics or {}).items() if m.retention is not None}
    return f"of {min(known, key=lambda name: known[name])}" if known else ""


def _accepted(result: MergeResult) -> str | None:
    return None if result.accepted is None else "yes" if result.accepted else "no"


def _common_tiles(spec: JobSpec, result: JobResult) -> list[tuple[str, str | None, str]]:
    method = _breakable(str(result.method["name"]))
    seconds = sum(result.timings.model_dump(exclude=NOT_KNOWN_YET).values())
    return [
        ("models", str(len(spec.models)), ""),
        ("method", method, "chosen by auto" if isinstance(result, MergeResult) and result.candidates else ""),
        ("time", _seconds(seconds), f"on {result.device}, {size(result.peak_memory_bytes)} of memory"),
    ]


def _breakable(name: str) -> Markup:
    """Let a long name break after its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _summary(spec: MergeSpec, result: MergeResult) -> str:
    names = listed([model.name for model in spec.models])
    if spec.method.stacked_slices:
        return f"Layers of {names}, stacked by {spec.method.name}."
    base = f" Their base is {spec.base.source}." if spec.base else ""
    return f"{names}, merged by {result.method['name']}.{base}"


def _retention(result: MergeResult) -> list[Markup]:
    if not result.metrics:
        return []
    columns, rows = metric_table(result)
    shown = details("Table of all versions", table(columns, rows, "Metrics by model", numeric=range(2, len(columns))))
    return [element("p", ABOUT_METRICS, class_="note"), versions(result.metrics), shown]


def _notes(result: JobResult) -> Section:
    items = [element("li", note) for note in result.notes]
    return Section("notes", "Notes", [element("ul", items)] if items else [])


def _merged(
    spec: MergeSpec, plan: MergePlan, result: MergeResult, contents: Contents, base: str | None
) -> list[Markup | None]:
    is_stack = bool(spec.method.stacked_slices)
    measured = any(m.examples for m in result.models)
    columns: dict[str, list[str]] = {
        "model": [m.name for m in result.models],
        "checkpoint": [m.checkpoint for m in result.models],
        "rows measured": [str(m.examples) if measured else "-" for m in result.models],
        "rows the head was aligned on": [str(m.aligned_examples) if spec.aligns else "-" for m in result.models],
        "share of the bytes" if is_stack else "mean merge weight": [number(m.weight_share, 3) for m in result.models],
        "its error": [number(m.weight_error, 3) for m in result.models],
        "its own parameters": [_compact(m.model_dump(mode="json")["parameters"]) for m in result.models],
        "seconds to measure": [number(m.score_seconds, 1) if measured else "-" for m in result.models],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    if plan.base is not None and base is not None:
        of_base = {"model": "base", "checkpoint": plan.base.source}
        columns = {name: [*cells, of_base.get(name, "-")] for name, cells in columns.items()}
    numeric = [index for index, name in enumerate(columns) if name not in ("model", "checkpoint", "its own parameters")]
    rows = list(zip(*columns.values(), strict=True))
    made = contents.construction
    parts: list[Markup | None] = [table(list(columns), rows, "Models", numeric=numeric)]
    if spec.method.stacked_slices:
        parts.append(table(SLICE_COLUMNS, slice_rows(spec.method.stacked_slices), "Slices"))
    return [*parts, *(_construction(made, is_stack) if made else ())]


def _construction(made: Construction, is_stack: bool) -> list[Markup]:
    facts: list[list[Cell]] = [
        ["heads", HEADS[made.heads]],
        ["stored as", made.dtype],
        ["read", size(made.bytes_read)],
        ["written", size(made.bytes_written)],
    ]
    if made.vocabulary is not None:
        v = made.vocabulary
        more = f", {v.new} tokens new" if v.new else ""
        facts.insert(1, ["vocabulary", f"that of {v.owner}, {v.rows} rows{more}"])
    groups = [
        [
            f"{g.kind}{', outside the layers' if g.outside_layers else ''}",
            "copied"
            if g.copied or is_stack
            else f"slices follow their {' and '.join(NODE_KINDS[name].title for name in g.owner.split(', '))}"
            if g.owner
            else "as a whole",
            str(g.tensors),
            f"{g.values:,}",
            ", ".join(g.dtypes),
        ]
        for g in made.groups
    ]
    of_groups = table(["tensors", "how", "number", "values", "stored as"], groups, "Groups of tensors", numeric=(2, 3))
    return [
        element("div", table(["what", "how"], facts, "The output"), class_="facts"),
        details("Groups of tensors", of_groups),
    ]


def _measured(result: ScoreResult) -> list[Markup]:
    rows = [
        [m.name, m.checkpoint, str(m.examples), m.estimator or "-", number(m.score_seconds, 1)] for m in result.models
    ]
    columns = ["model", "checkpoint", "rows measured", "estimator", "seconds"]
    return [table(columns, rows, "Models", numeric=(2, 4))]


def _kept(result: ScoreResult) -> list[Markup]:
    rows = [[m.name, s.statistic, f"{s.bytes:,}", element("code", s.digest)] for m in result.models for s in m.scores]
    return [table(["model", "statistic", "bytes", "digest"], rows, "Statistics in the store", numeric=(2,))]


def _run(result: JobResult, contents: Contents) -> list[Markup]:
    spent = result.timings.model_dump(exclude=NOT_KNOWN_YET)
    spent = {name.removesuffix("_seconds"): seconds for name, seconds in spent.items() if seconds}
    machine = [
        ["device", result.device],
        ["threads", str(contents.threads)],
        ["peak memory", size(result.peak_memory_bytes)],
        *[[name, version] for name, version in contents.versions.items()],
    ]
    inputs: list[list[Cell]] = [
        [m.name, m.commit or "-", element("code", m.digest)] for m in getattr(result, "models", [])
    ]
    return [
        *timings(spent),
        details(
            "Machine and versions",
            element("div", table(["what", "which"], machine, "Machine and versions"), class_="facts"),
        ),
        details("Digests of the inputs", table(["model", "commit", "digest"], inputs, "Digests of the inputs")),
    ]


def _repeat(spec: JobSpec, result: JobResult, route: str) -> Section:
    recipe = json.dumps(spec.recipe, indent=2, ensure_ascii=False)
    shown = recipe if len(recipe) <= MOST_RECIPE_LETTERS else None
    data = f"--data @- <<'END'\n{shown}\nEND" if shown else "--data @recipe.json"
    host = f'"${{MASKMERGE_URL:-http://127.0.0.1:8000}}{route}"'
    key = '${MASKMERGE_API_KEY:+-H "Authorization: Bearer $MASKMERGE_API_KEY"}'
    command = f"curl --fail-with-body {host} {key} -H 'Content-Type: application/json' {data}"
    method = json.dumps(result.method, indent=2, ensure_ascii=False)
    about = (
        "Posts the recipe to the service at MASKMERGE_URL, by default one on this machine, with the key in "
        "MASKMERGE_API_KEY if there is one. manifest.json names what the same bits need."
    )
    return Section(
        "repeat",
        "How to repeat it",
        [
            element("p", about, element("code", " recipe.json"), " in the artifact is the same recipe.", class_="note"),
            _block("Command", command),
            details("Method as run", _block("Method as run", method)),
        ],
    )


def _block(label: str, content: str) -> Markup:
    return element("pre", content, tabindex=0, role="region", aria_label=label)


def _compact(values: Mapping[str, object]) -> str:
    text = ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items())
    return (text if len(text) <= 200 else text[:199] + "…") or "-"
