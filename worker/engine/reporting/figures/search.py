"""Pictures of a search: its trials, and what each parameter did."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from worker.engine.catalog.contracts.report import FailedTrial, MergeResult, Trial
from worker.engine.catalog.drawing.charts import (
    Plot,
    Scale,
    Series,
    key,
    plot,
)
from worker.engine.catalog.drawing.html import details, element, table
from worker.engine.reporting.words import (
    settings_of,
)

MOST_LETTERED = 60  # number of trials that are marked with their candidate's letter
MOST_TRIALS = 200  # number of trials in a table
LEAST_TRIALS = 4  # number of trials from which a parameter's relation to the objective shows
MOST_PARAMETERS = 6
WIDE_RANGE = 50  # ratio of a parameter's largest and least value from which its axis is logarithmic


def search(result: MergeResult) -> list[Markup | None]:
    """Draw the objective of every trial, and over each parameter of the chosen candidate."""
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
