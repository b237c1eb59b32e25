"""How many rows adaptive stopping scores, and what its merges lose against scores of all rows.

    python bench/stopping.py --data DATA [--out OUT] [--json FILE] [--tolerances T ...] [--validation-rows N]

Scores the experts of bench/experts.py on all their training rows, keeping the sums of every look on the way. For all
pairs and all experts at once it then finds where `mask_fisher` with `examples: "auto"` stops, merges by the scores that
are known there and by those of all rows, and compares both on held-out rows, with heads kept and aligned.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bench.combinations import Combination
from bench.outcomes import Outcome
from bench.quality import HEADS, SEED, Bench
from bench.table import console, shown
from worker.engine.catalog.contracts.report import StoppingPoint
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.methods import MaskFisherParameters
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.tasks import LabelMap
from worker.engine.checkpoints.reader import Digests
from worker.engine.evaluation.metrics import bootstrap
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.methods.mask_fisher import node_weights
from worker.engine.merging.stopping import Owned, Scored, errors_at, point
from worker.engine.models.loading import load
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample, looks
from worker.engine.scoring.store import StatisticsStore
from worker.engine.tasks.metrics import Array

ALIGNMENT_ROWS = 512
MOST_SHARE = 0.25  # of the rows
METHOD = MaskFisherParameters()


@dataclass(frozen=True)
class Comparison:
    """One task of one combination: its accuracy with the scores where scoring stops, and with those of all rows."""

    stopped: float
    full: float
    interval: tuple[float, float]
    """95 % of the paired difference."""
    own: tuple[float, float]
    """95 % of the accuracy with the scores of all rows."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than chance."""
        return self.interval[0] > 0 or self.interval[1] < 0

    @property
    def is_within(self) -> bool:
        """Whether it is less than what is known of the accuracy anyway."""
        return self.own[0] <= self.stopped <= self.own[1]


@dataclass(frozen=True)
class Stop:
    """The point at which scoring of a combination stops at a tolerance. `rows` and `of` are over all of its models."""

    rows: int
    of: int
    look: int
    error: float
    comparisons: dict[tuple[str, str], Comparison]
    """Comparisons by task and head."""

    @property
    def share(self) -> float:
        return self.rows / self.of


class StoppingBench:
    def __init__(self, out: Path, data: Path | None, validation_rows: int) -> None:
        self.bench = Bench(out, data, ALIGNMENT_ROWS, validation_rows)
        self.scored: dict[str, Scored] = {}
        self.owned: Owned = {}
        self._outcomes: dict[tuple[Combination, tuple[int, ...]], dict[str, Outcome]] = {}

    def score(self) -> None:
        """Every expert on all its rows."""
        with StatisticsStore(self.bench.out / "statistics", 10**11) as store:
            for name, expert in self.bench.experts.items():
                start = time.monotonic()
                spec, _ = self.bench.rows_of(name, "train")
                rows = sample(RowFile(spec), spec, None)
                model = load(expert.info, self.bench.device)
                own = Sample(rows, len(rows), spec, model, LabelMap(model.task))
                plan = plan_merge([expert.info])
                self.owned = plan.owned
                measurer = Measurer(METHOD, plan.linear_inputs, self.bench.precision, store, BatchSizes())
                digest = Digests().of_checkpoint(expert.info)
                found = measurer.measure(Measured(), model, digest, own, len(own), lambda _: None)
                self.scored[name] = Scored(1.0, found.sums, len(own))
                console.print(f"{name}: {len(own)} rows, {time.monotonic() - start:.0f} s", highlight=False)

    def curve(self, tasks: Combination) -> list[StoppingPoint]:
        models = [self.scored[task] for task in tasks]
        most = max(model.population for model in models)
        return [found for rows in looks(most) if (found := point(METHOD, models, rows, self.owned)) is not None]

    def calibration(self, tasks: Combination) -> dict[int, float]:
        """Return, by look, how far the merge weights are from those of all rows, over how far their errors say."""
        models = [self.scored[task] for task in tasks]
        most = max(model.population for model in models)
        final = self._weights(tasks, most)
        found = {}
        for rows in looks(most)[:-1]:
            errors = errors_at(METHOD, models, rows, self.owned)
            if errors is not None:
                weights = self._weights(tasks, rows)
                actual = torch.cat([(weights[site] - final[site]).flatten() for site in errors])
                stated = torch.cat([of.flatten() for of in errors.values()])
                found[rows] = float(actual.norm() / stated.norm())
        return found

    def _models(self, tasks: Combination, rows: int) -> list[MeasuredModel]:
        """The experts with the scores of so many rows, or of all where there are fewer."""
        scored = [self.scored[task] for task in tasks]
        return [MeasuredModel(1.0, of.sums[min(rows, of.population)].scores()) for of in scored]

    def _weights(self, tasks: Combination, rows: int) -> dict[str, Tensor]:
        weights = node_weights(self._models(tasks, rows), METHOD)
        return {score: weights(score, places[0]) for score, places in self.owned.items()}

    def stop(self, tasks: Combination, tolerance: float) -> Stop:
        at = next(found for found in self.curve(tasks) if found.error <= tolerance)
        full = max(model.population for model in self.scored.values())
        ours, reference = self._merged(tasks, at.examples), self._merged(tasks, full)
        rows = [min(at.examples, self.scored[task].population) for task in tasks]
        comparisons = {
            (task, head): self._compared(task, getattr(ours[task], head), getattr(reference[task], head))
            for task in tasks
            for head in HEADS
        }
        return Stop(sum(rows), sum(self.scored[t].population for t in tasks), at.examples, at.error, comparisons)

    def _merged(self, tasks: Combination, rows: int) -> dict[str, Outcome]:
        """The tasks' outcomes of the merge by the scores of so many rows."""
        of_each = tuple(min(rows, self.scored[task].population) for task in tasks)
        if (tasks, of_each) not in self._outcomes:
            experts = [self.bench.experts[task] for task in tasks]
            plan = plan_merge([expert.info for expert in experts])
            state = self.bench.state(plan, METHOD, self._models(tasks, rows))
            self._outcomes[tasks, of_each] = {task: self.bench.evaluate(state, task) for task in tasks}
        return self._outcomes[tasks, of_each]

    def _compared(self, task: str, stopped: Array, full: Array) -> Comparison:
        expert = self.bench.experts[task]
        one, other = bootstrap("accuracy", expert.model.task, expert.labels, [stopped, full], SEED)
        low, high = np.quantile(one - other, [0.025, 0.975])
        least, most = np.quantile(other, [0.025, 0.975])
        of_stopped, of_full = (float((predicted == expert.labels).mean()) for predicted in (stopped, full))
        return Comparison(of_stopped, of_full, (float(low), float(high)), (float(least), float(most)))


def show_curves(title: str, curves: dict[Combination, dict[int, float]]) -> None:
    columns = sorted({rows for curve in curves.values() for rows in curve})
    table = Table(title=f"{title}, by rows of each model", title_justify="left")
    for column in ("tasks", *map(str, columns)):
        table.add_column(column, justify="left" if column == "tasks" else "right")
    for tasks, curve in curves.items():
        table.add_row("+".join(tasks), *(f"{curve[rows]:.3f}" if rows in curve else "" for rows in columns))
    console.print(table)


def show_stops(tolerance: float, stops: dict[Combination, Stop]) -> None:
    table = Table(title=f"Tolerance {tolerance:g}", title_justify="left")
    for column in ("tasks", "rows", "share", "error", "head", "stopped - all rows, by task (95 % interval)"):
        table.add_column(column)
    for tasks, stop in stops.items():
        for head in HEADS:
            of_tasks = [(task, stop.comparisons[task, head]) for task in tasks]
            differences = [
                f"{task} {c.stopped - c.full:+.4f} ({c.interval[0]:+.4f} to {c.interval[1]:+.4f})"
                for task, c in of_tasks
            ]
            table.add_row(
                "+".join(tasks), str(stop.look), f"{stop.share:.3f}", f"{stop.error:.3f}", head, "\n".join(differences)
            )
    console.print(table)


def calibration_targets(calibrated: dict[Combination, dict[int, float]]) -> list[dict[str, Any]]:
    """Errors must be neither too small nor too large, in the mean over the combinations."""
    found = []
    for rows in sorted(set.intersection(*(set(of) for of in calibrated.values()))):
        ratio = float(np.sqrt(np.mean([of[rows] ** 2 for of in calibrated.values()])))
        what = f"{rows} rows: what the weights are off by, over what their errors say"
        target, met = "0.7 to 1.4", 0.7 <= ratio <= 1.4
        found.append({"what": what, "ours": ratio, "reference": 1.0, "ratio": ratio, "target": target, "met": met})
    return found


def targets(tolerance: float, stops: dict[Combination, Stop]) -> list[dict[str, Any]]:
    """What must be reached, as rows of the bench's JSON."""
    used, there = sum(stop.rows for stop in stops.values()), sum(stop.of for stop in stops.values())
    largest = max(stop.share for stop in stops.values())

    def row(what: str, ours: float, reference: float, target: str, met: bool) -> dict[str, Any]:
        ratio = ours / reference if reference else None
        what = f"tolerance {tolerance:g}: {what}"
        return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": bool(met)}

    found = [
        row("rows scored, over all combinations", used, there, "a quarter at most", used <= MOST_SHARE * there),
        row("largest share of a combination's rows", largest, 1.0, "a quarter at most", largest <= MOST_SHARE),
    ]
    for head in HEADS:
        compared = [c for stop in stops.values() for (_, of), c in stop.comparisons.items() if of == head]
        stopped, full = (float(np.mean([getattr(c, which) for c in compared])) for which in ("stopped", "full"))
        furthest = max(abs(c.stopped - c.full) for c in compared)
        outside, clear = sum(not c.is_within for c in compared), sum(c.is_clear for c in compared)
        found += [
            row(f"heads {head}, mean accuracy", stopped, full, "within 0.005", abs(stopped - full) <= 0.005),
            row(f"heads {head}, largest difference", furthest, 0.0, "within 0.02", furthest <= 0.02),
            row(f"heads {head}, outside the accuracy's own interval", outside, len(compared), "none", not outside),
            row(f"heads {head}, paired differences beyond chance", clear, len(compared), "none", not clear),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What adaptive stopping saves, and what its merges lose.")
    parser.add_argument("--data", type=Path, help="folder that is searched for tasks besides the packaged ones")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="experts and statistics (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.2, 0.05], help="(%(default)s)")
    parser.add_argument("--validation-rows", type=int, default=800, help="held out, at most (%(default)s)")
    options = parser.parse_args()
    bench = StoppingBench(options.out, options.data, options.validation_rows)
    bench.score()
    tasks = tuple(bench.bench.experts)
    merged = [*combinations(tasks, 2), *([tasks] if len(tasks) > 2 else [])]
    errors = {of: {at.examples: at.error for at in bench.curve(of)} for of in merged}
    show_curves("Largest error of the merge weights", errors)
    calibrated = {of: bench.calibration(of) for of in merged}
    show_curves("What the weights are off by, over what their errors say", calibrated)
    found = calibration_targets(calibrated)
    for tolerance in options.tolerances:
        stops = {of: bench.stop(of, tolerance) for of in merged}
        show_stops(tolerance, stops)
        found += targets(tolerance, stops)
    shown(options.json, found)


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
