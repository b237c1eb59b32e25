"""Makes the report's pictures, each with a description in words and a table of its numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from worker.engine.catalog.contracts.report import FailedTrial, MergeResult, MetricResult, Stopping, Trial, Version
from worker.engine.catalog.families import NODE_KINDS
from worker.engine.reporting.charts import (
    Bar,
    DotRow,
    Plot,
    Scale,
    Series,
    bars,
    dots,
    heat,
    key,
    plot,
    ramp,
)
from worker.engine.reporting.colours import LEVELS
from worker.engine.reporting.contents import InterferenceReport, Known, LayerInterference, Maps, NodeMap, Spread
from worker.engine.reporting.html import details, element, table
from worker.engine.reporting.words import (
    about_candidates,
    candidate_remarks,
    candidate_table,
    listed,
    number,
    settings_of,
)

MOST_DOTTED = 12  # number of models that a row of dots tells apart
MOST_LETTERED = 60  # number of trials that are marked with their candidate's letter
MOST_LETTERS = 36  # letters of a name above a line, for which a phone has room
MOST_TRIALS = 200  # number of trials in a table
LEAST_TRIALS = 4  # number of trials from which a parameter's relation to the objective shows
MOST_PARAMETERS = 6
WIDE_RANGE = 50  # ratio of a parameter's largest and least value from which its axis is logarithmic
REACH = 0.95  # share of merge weights that a map tells apart; others have its last colours
OCTAVES = 3.0  # a map of scores goes from 1/8 of the mean to 8 times
VERSIONS: dict[Version, str] = {
    "base": "base",
    "expert": "expert",
    "best_expert": "best expert",
    "average": "plain average",
    "merged_kept_head": "kept head",
    "merged": "merged",
}
ABOUT_ERRORS = (
    "Standard errors of the merge weights: the root mean square over the nodes of a layer and kind, of the layer, kind "
    "and model where it is largest; the shade goes down to where it is smallest. Scores are heavy-tailed: errors from "
    "fewer than a few hundred rows are too small."
)

Grid = Sequence[Sequence[Known]]


def versions(metrics: Mapping[str, MetricResult]) -> Markup:
    """Draw bars of every version, by model."""
    low = min(0.0, *(m.intervals[version][0] for m in metrics.values() for version in m.intervals))
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
        picture = bars(f"kept-{index}", title, f"{said}. Lines are 95 % intervals.", rows, low=low)
        head = element("h3", element("span", name), element("span", f"{m.metric}, {kept}"))
        cards.append(element("div", head, picture, class_="card"))
    return element("div", cards, class_="cards")


def candidates(result: MergeResult) -> list[Markup]:
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


def search(result: MergeResult) -> list[Markup | None]:
    found = result.search
    if found is None or not found.trials:
        return []
    trials = sorted(found.trials, key=lambda trial: trial.number)
    names = list(dict.fromkeys(trial.candidate for trial in trials))
    chosen = next((trial for trial in trials if trial.number == found.chosen), None)
    objective = f"smoothed {found.objective.replace('_', ' ')}"
    best = f"The best {objective} was that of trial {found.chosen}."
    if found.min_retention:
        lacks = "reaches the floors" if found.feasible else "lacks least to the floors, which no trial reaches"
        best = f"Of those that were looked at on all of them, trial {found.chosen} {lacks}."
        objective += ", less what is lacking to the floors"
    rows = sorted({*found.search_rows.values()})
    on = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else str(rows[0]) if rows else "the"
    said = (
        f"{len(trials) + len(found.failed)} merges were tried on {on} search rows of each model, apart from those that "
        f"candidates are compared on. {best}"
    )
    return [
        element("p", said),
        _trials(trials, names, chosen, objective),
        element(
            "p",
            f"{objective.capitalize()}. Smoothed, a row that is barely right counts less than one that clearly is, "
            "which tells better what keeps most on other rows. The ring is the chosen trial, the grey line the best so "
            "far.",
            class_="note",
        ),
        key(
            [(index, f"{_letter(index)}: {name}") for index, name in enumerate(names)],
            hollow="hollow: given up early, on fewer rows" if any(trial.pruned for trial in trials) else None,
        ),
        _parameters(trials, chosen),
        _trial_table(trials),
        _failed(found.failed),
    ]


def _failed(trials: Sequence[FailedTrial]) -> Markup | None:
    if not trials:
        return None
    rows = [[str(t.number), t.candidate, settings_of(t.parameters), t.error] for t in trials[:MOST_TRIALS]]
    caption = f"Merges that could not be made: {len(trials)}"
    return details(caption, table(["trial", "candidate", "parameters", "why"], rows, caption, numeric=(0,)))


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _trials(trials: Sequence[Trial], names: Sequence[str], chosen: Trial | None, objective: str) -> Markup:
    series, steps = [], []
    best = -math.inf
    for trial in trials:
        if not trial.pruned and trial.objective > best:
            best = trial.objective
        if best > -math.inf:
            steps.append((float(trial.number), best))
    for index, name in enumerate(names):
        own = [trial for trial in trials if trial.candidate == name]
        hollow = frozenset(i for i, trial in enumerate(own) if trial.pruned)
        points = [(float(trial.number), trial.objective) for trial in own]
        series.append(Series(index, points, is_joined=False, hollow=hollow))
    letters = [(float(t.number), t.objective, _letter(names.index(t.candidate))) for t in trials]
    first, last = trials[0].number, trials[-1].number
    margin = max(0.5, (last - first) * 0.02)
    title = f"{objective.capitalize()} of each trial"
    ends = [trial.objective for trial in trials]
    said = f"From {min(ends):.3f} to {max(ends):.3f}; the best that was not given up is {best:.3f}."
    return plot(
        "search-p",
        title,
        said,
        Plot(
            Scale(first - margin, last + margin),
            Scale.around(ends, least=0.02),
            series,
            "trial",
            x_ticks=[(float(n), str(n)) for n in range(first, last + 1, max(1, math.ceil((last - first) / 8)))],
            steps=steps,
            letters=letters if len(trials) <= MOST_LETTERED else (),
            rings=[(float(chosen.number), chosen.objective)] if chosen else (),
            height=240,
        ),
    )


def _parameters(trials: Sequence[Trial], chosen: Trial | None) -> Markup | None:
    """Draw the objective over each number that was tried for the chosen trial's candidate."""
    of = [trial for trial in trials if chosen is not None and trial.candidate == chosen.candidate]
    if chosen is None or len(of) < LEAST_TRIALS:
        return None
    cards: list[Markup] = []
    for name in chosen.parameters:
        points = [(float(t.parameters[name]), t) for t in of if _is_number(t.parameters.get(name))]
        if len(points) < LEAST_TRIALS or len({x for x, _ in points}) < 3 or len(cards) == MOST_PARAMETERS:
            continue
        hollow = frozenset(i for i, (_, trial) in enumerate(points) if trial.pruned)
        x, y = _parameter_scale([x for x, _ in points]), Scale.around([t.objective for _, t in points], least=0.02)
        series = Series(0, [(x, t.objective) for x, t in points], is_joined=False, hollow=hollow)
        best = max(points, key=lambda point: point[1].objective)
        said = f"{len(points)} trials; the best objective, {best[1].objective:.3f}, is at {best[0]:.4g}."
        rings = [(float(chosen.parameters[name]), chosen.objective)] if _is_number(chosen.parameters[name]) else []
        drawn = Plot(x, y, [series], name, height=110, rings=rings)
        cards.append(element("div", plot(f"search-{len(cards)}", f"Objective over {name}", said, drawn), class_="card"))
    if not cards:
        return None
    return element(
        "div", element("h3", f"What the parameters of {chosen.candidate} do"), element("div", cards, class_="cards")
    )


def _parameter_scale(values: Sequence[float]) -> Scale:
    """Make a scale, which is logarithmic if values are spread over orders of magnitude."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= WIDE_RANGE:
        return Scale(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)), is_log=True)
    return Scale.around(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _trial_table(trials: Sequence[Trial]) -> Markup:
    shown = trials
    if len(trials) > MOST_TRIALS:
        best = sorted(trials, key=lambda trial: -trial.objective)[:MOST_TRIALS]
        shown = sorted(best, key=lambda trial: trial.number)
    rows = [
        [
            str(trial.number),
            trial.candidate,
            f"{trial.objective:.4f}",
            f"{sum(trial.retentions.values()) / len(trial.retentions):.4f}",
            "given up" if trial.pruned else "whole",
            str(trial.rows),
            f"{trial.seconds:.1f}",
            settings_of(trial.parameters),
        ]
        for trial in shown
    ]
    columns = ["trial", "candidate", "objective", "mean retention", "evaluation", "rows", "seconds", "parameters"]
    caption = "Trials" if shown is trials else f"The best {len(shown)} of {len(trials)} trials; report.json has all"
    return details("Table of trials", table(columns, rows, caption, numeric=(2, 3, 5, 6)))


def scores(maps: Maps | None) -> list[Markup]:
    """Draw a map of each kind of node for each model, relative to the model's mean."""
    if maps is None:
        return []
    about = (
        "The score of a mask node is how much the model's predictions depend on it, the Fisher information of a factor "
        "on it. Colours show it relative to the mean over the model's nodes of that kind."
    )
    parts = [element("p", about, class_="note"), *_left_out(maps)]
    parts.append(ramp("a", "1/8 of the mean", "8 times", "or further from it"))
    for index, name in enumerate(maps.models):
        drawn = []
        for of in _of(maps, name):
            grid = of.scores[name]
            mean = _mean(grid)
            levels = [[_octave(value, mean) for value in row] for row in grid]
            title = f"Scores of {name}: {NODE_KINDS[of.nodes].title} by layer"
            said = f"Mean {mean:.3g}. The largest mean of a block is {max(_flat(grid)):.3g}{_where(of, grid)}."
            picture = heat(
                f"scores-{of.nodes}-{index}", title, said, levels, ramp="a", rows=of.layers, columns=of.count
            )
            drawn.append((f"{NODE_KINDS[of.nodes].title}, mean {mean:.3g}", picture, _grid_table(of, grid, title)))
        parts.append(_of_model(name, drawn))
    return parts


def weights(maps: Maps | None) -> list[Markup]:
    """Draw such maps of merge weights, around the weight that each model has by its lambda."""
    if maps is None or not any(of.weights for of in maps.maps):
        return []
    apart = sorted(
        abs(value - (of.lambdas[name] or 0))
        for of in maps.maps
        for name, grid in of.weights.items()
        for value in _flat(grid)
    )
    reach = apart[int(len(apart) * REACH)]
    about = (
        "The merge weight that the slices of a head or neuron take from each model. The middle colour is the model's "
        "share by its weight alone, where scores say nothing."
    )
    parts = [element("p", about, class_="note"), *_left_out(maps, says_blocks=False)]
    parts.append(ramp("b", f"{reach:.2f} less", f"{reach:.2f} more", "than its share by weight, or further"))
    for index, name in enumerate(maps.models):
        drawn = []
        for of in _of(maps, name):
            grid, middle = of.weights[name], of.lambdas[name] or 0.0
            levels = [[_balance(value, middle, reach) for value in row] for row in grid]
            flat = _flat(grid)
            title = f"Merge weights of {name}: {NODE_KINDS[of.nodes].title} by layer"
            said = f"From {min(flat):.3f} to {max(flat):.3f}, {middle:.3f} by the model's weight alone."
            picture = heat(
                f"weights-{of.nodes}-{index}", title, said, levels, ramp="b", rows=of.layers, columns=of.count
            )
            label = f"{NODE_KINDS[of.nodes].title}, mean {_mean(grid):.3f}"
            drawn.append((label, picture, _grid_table(of, grid, title)))
        parts.append(_of_model(name, drawn))
    return parts


def _of_model(name: str, drawn: Sequence[tuple[str, Markup, Markup]]) -> Markup:
    pictures = [element("div", element("h4", label), picture) for label, picture, _ in drawn]
    tables = details("Tables", [of for _, _, of in drawn])
    return element("div", element("h3", name), element("div", pictures, class_="wide"), tables, class_="model")


def _of(maps: Maps, model: str) -> list[NodeMap]:
    return [of for of in maps.maps if model in of.scores]


def _left_out(maps: Maps, *, says_blocks: bool = True) -> list[Markup]:
    pooled: dict[str, None] = {}
    for of in maps.maps:
        grid = next(iter(of.scores.values()))
        if len(grid[0]) < of.count:
            pooled[f"{len(grid[0])} blocks of {of.count} {NODE_KINDS[of.nodes].title}"] = None
        if len(grid) < of.layers:
            pooled[f"{len(grid)} runs of {of.layers} layers"] = None
    said = []
    if pooled and says_blocks:
        said.append(f"Maps show means over {listed(list(pooled))}; the folder scores has the scores of all nodes.")
    if maps.left_out:
        said.append(f"Shown are the first {len(maps.models)} of {len(maps.models) + maps.left_out} models.")
    return [element("p", " ".join(said), class_="note")] if said else []


def _flat(grid: Grid) -> list[float]:
    return [value for row in grid for value in row if value is not None]


def _mean(grid: Grid) -> float:
    return statistics.fmean(_flat(grid))


def _where(of: NodeMap, grid: Grid) -> str:
    largest = max(_flat(grid))
    row = next(index for index, cells in enumerate(grid) if largest in cells)
    return f", in layer {row * of.layers // len(grid)}"


def _octave(value: float | None, mean: float) -> int | None:
    if value is None:
        return None
    if value <= 0 or mean <= 0:
        return 0
    return _level((math.log2(value / mean) + OCTAVES) / (2 * OCTAVES))


def _balance(value: float | None, middle: float, reach: float) -> int | None:
    return None if value is None else _level(0.5 + (value - middle) / (2 * reach) if reach else 0.5)


def _level(share: float) -> int:
    return min(LEVELS - 1, max(0, math.floor(share * LEVELS)))


def _grid_table(of: NodeMap, grid: Grid, caption: str) -> Markup:
    """Make a table whose rows are layers and whose columns are nodes, or blocks of them, by their first."""
    width = max(map(len, grid))
    columns = ["layer", *(str(_first(index, of.count, width)) for index in range(width))]
    rows = [
        [str(_first(index, of.layers, len(grid))), *("-" if value is None else f"{value:.3g}" for value in cells)]
        for index, cells in enumerate(grid)
    ]
    return element("div", table(columns, rows, caption, numeric=range(1, width + 1)), class_="tiny")


def _first(index: int, of: int, parts: int) -> int:
    """Return the first entry of run `index`. If not all runs can be equally long, the first ones are one longer."""
    return index * (of // parts) + min(index, of % parts)


def interference(found: InterferenceReport | None) -> list[Markup]:
    if found is None:
        return []
    share = "all values" if found.share_read == 1 else f"{100 * found.share_read:.3g} % of the values, evenly spread"
    pairs = (
        "the two models"
        if found.pairs_in_all == 1
        else f"{found.pairs_in_all} pairs of models, shaded from the least to the most"
    )
    about = (
        "Task vectors are what models changed in their base. Where they point the same way, their cosine is 1; values "
        "that two models changed in opposite directions are in conflict. "
        f"Computed from {share} of each model, for {pairs}."
    )
    layers = [layer for layer in found.layers if layer.layer is not None]
    cards = [
        _by_layer("cosine", "Cosine between task vectors", layers, [layer.cosine for layer in layers], 0),
        _by_layer("conflicts", "Share of sign conflicts", layers, [layer.sign_conflicts for layer in layers], 1),
    ]
    rows = [
        ["outside" if layer.layer is None else str(layer.layer), *_spread(layer.cosine), *_spread(layer.sign_conflicts)]
        for layer in found.layers
    ]
    columns = ["layer", "mean cosine", "least", "most", "mean share of conflicts", "least", "most"]
    listed = [[" and ".join(p.models), number(p.cosine, 3), number(p.sign_conflicts, 3)] for p in found.pairs]
    caption = "Pairs over all layers"
    if found.pairs_in_all > len(found.pairs):
        caption += f": the first {len(found.pairs)} of {found.pairs_in_all}"
    return [
        element("p", about, class_="note"),
        element("div", [card for card in cards if card], class_="cards"),
        details("Table by layer", table(columns, rows, "Interference by layer", numeric=range(1, 7))),
        details("Table by pair", table(["models", "cosine", "share of conflicts"], listed, caption, numeric=(1, 2))),
    ]


def _spread(of: Spread | None) -> list[str]:
    return ["-"] * 3 if of is None else [f"{value:.3f}" for value in (of.mean, of.least, of.most)]


def _by_layer(
    name: str, title: str, layers: Sequence[LayerInterference], values: Sequence[Spread | None], index: int
) -> Markup | None:
    known = [(float(of.layer or 0), value) for of, value in zip(layers, values, strict=True) if value is not None]
    if not known:
        return None
    ends = [end for _, value in known for end in (value.least, value.most)]
    series = Series(index, [(x, v.mean) for x, v in known], [(v.least, v.most) for _, v in known])
    mean = statistics.fmean(value.mean for _, value in known)
    said = f"By layer, on average {mean:.3f}; all pairs lie between {min(ends):.3f} and {max(ends):.3f}."
    last = known[-1][0]
    ticks = [(float(n), str(n)) for n in range(0, int(last) + 1, max(1, math.ceil(last / 8)))]
    drawn = Plot(Scale(0, max(last, 1)), Scale.around([0.0, *ends]), [series], "layer", x_ticks=ticks)
    return element("div", element("h3", title), plot(f"interference-{name}", title, said, drawn), class_="card")


def certainty(stopping: Stopping | None, model: str | None = None, index: int = 0) -> list[Markup]:
    """Draw the error curve; with `model`, that of this model alone, the job's number `index`."""
    if stopping is None or not stopping.curve:
        return []
    curve = stopping.curve
    points = [(float(look.examples), look.error) for look in curve]
    spans = [(min(look.errors.values(), default=look.error), look.error) for look in curve]
    limits = [] if stopping.tolerance is None else [(stopping.tolerance, f"tolerance {stopping.tolerance:g}")]
    first, last = points[0][0], points[-1][0]
    x = Scale(first, last, is_log=True) if last > first else Scale(first - 1, first + 1)
    top = Scale.around([0.0, *(y for _, y in points), *(value for value, _ in limits)])
    said = f"After {curve[-1].examples} rows of each model the largest error is {curve[-1].error:.4f}."
    if stopping.reached is not None:
        said += " That is within the tolerance." if stopping.reached else " That is above the tolerance."
    ticks = [(value, f"{value:.0f}") for value, _ in points]
    title = "Largest error of the merge weights" + (f" with {model}" if model else "")
    drawn = Plot(x, top, [Series(0, points, spans)], "rows of each model", x_ticks=ticks, limits=limits)
    picture = plot(f"certainty-{index}", title, said, drawn)
    rows = [[str(look.examples), f"{look.error:.4f}"] for look in curve]
    caption = "Largest error by rows" + (f", {model}" if model else "")
    return [
        element("h3", model) if model else element("p", ABOUT_ERRORS, class_="note"),
        element("p", said),
        element("div", picture, class_="narrow"),
        details("Table", table(["rows of each model", "largest error"], rows, caption, numeric=(1,))),
    ]


def timings(spent: Mapping[str, float]) -> list[Markup]:
    if not spent:
        return []
    rows = [Bar(name, seconds, f"{seconds:.2f} s", strong=True) for name, seconds in spent.items()]
    said = "; ".join(f"{row.label} {row.written}" for row in rows)
    picture = bars("timings", "Seconds by phase", f"{said}.", rows, high=max(spent.values()))
    columns = [[name, f"{seconds:.2f}"] for name, seconds in spent.items()]
    return [
        picture,
        details("Table of seconds", table(["phase", "seconds"], columns, "Seconds by phase", numeric=(1,))),
    ]
