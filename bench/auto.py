"""What `auto` finds against the best of its candidates, and what it costs.

    python bench/auto.py --data DATA [--out OUT] [--json FILE] [--trials N] [--rows N] [--only N ...]

Takes the experts of bench/experts.py (trained unless OUT has them), lets the service's engine search for the best merge
of all pairs, some triples and fours and all of them at once, and compares what it published with every other line of
the table on the same held-out rows, by a paired bootstrap. Before that it times 30 trials on three experts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from bench.combinations import combinations_of
from bench.experts import base_model_folder, prepare
from bench.table import console, shown
from worker.engine.catalog.contracts.report import Candidate, MergeResult
from worker.engine.catalog.contracts.spec import (
    CheckpointSpec,
    EvaluationSpec,
    MergeSpec,
    ModelSpec,
    OutputSpec,
    StoreSpec,
)
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import default_candidates
from worker.engine.jobs.engine import Engine

MEAN_TARGETS = {2: 0.99, 4: 0.985}
ALL_TARGET = 0.97
TIMED_TRIALS, TIMED_EXPERTS = 30, 3
LONGEST_S = 300.0
MAX_LENGTH = 128


@dataclass(frozen=True)
class Outcome:
    tasks: tuple[str, ...]
    result: MergeResult
    seconds: float

    @property
    def chosen(self) -> Candidate:
        [chosen] = [line for line in self.lines if line.chosen]
        return chosen

    @property
    def lines(self) -> Sequence[Candidate]:
        return self.result.candidates or ()

    @property
    def best_other(self) -> Candidate:
        """The best of what was not chosen, of candidates and plain merges: on rows that it was not chosen by."""
        others = [line for line in self.lines if not line.chosen and line.kind not in ("expert", "base")]
        return max(others, key=lambda line: line.mean_retention or 0.0)

    @property
    def is_behind(self) -> bool:
        """Whether any line beats the chosen one beyond chance."""
        return any(line.behind is not None and line.behind.interval[1] < 0 for line in self.lines)


class Searches:
    """Lets the service's engine search for the best merges of experts.

    Args:
        out: folder of tasks, experts and statistics, see bench/experts.py.
        rows: number of each task's rows to measure.
        alignment_rows: number of each task's rows to align its head on; None: those that are measured.
    """

    def __init__(
        self,
        out: Path,
        rows: int,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        alignment_rows: int | None = None,
    ) -> None:
        self._out = out
        self._rows = rows
        self._alignment_rows = alignment_rows or rows
        self._precision = precision
        self._engine = Engine()

    def method(self, models: int, trials: int) -> dict[str, Any]:
        """Return the method of a search, with the default candidates, of which each is tried at least once."""
        candidates = default_candidates(has_base=True, has_datasets=True, models=models)
        return {
            "name": "auto",
            "candidates": candidates,
            "trials": max(trials, len(candidates)),
            "examples": self._rows,
            "precision": self._precision,
        }

    def search(
        self,
        tasks: Sequence[str],
        trials: int,
        store: Path | None = None,
        on_published: Callable[[Path, MergeResult], None] = lambda folder, result: None,
    ) -> Outcome:
        """Search, and tell of the folder that was published, which is gone afterwards."""
        with TemporaryDirectory() as folder:
            spec = MergeSpec(
                name="+".join(tasks),
                models=[self._model(task) for task in tasks],
                method=self.method(len(tasks), trials),
                base=CheckpointSpec(source="base", path=base_model_folder()),
                output=OutputSpec(align_heads=True, alignment_rows=self._alignment_rows),
                evaluate=True,
                recipe={},
                folder=Path(folder),
                store=StoreSpec(folder=store or self._out / "statistics", max_bytes=10**11),
            )
            start = time.monotonic()
            result = self._engine.merge(spec, lambda *_: None)
            seconds = time.monotonic() - start
            on_published(Path(folder), result)
            return Outcome(tuple(tasks), result, seconds)

    def _model(self, task: str) -> ModelSpec:
        parts = {}
        for part in ("train", "validation"):
            path = self._out / "tasks" / task / f"{part}.jsonl"
            has_pairs = "text_pair" in json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
            parts[part] = {
                "source": task,
                "path": path,
                "label": "label",
                "text_pair": "text_pair" if has_pairs else None,
                "max_length": MAX_LENGTH,
            }
        return ModelSpec(
            name=task,
            source=task,
            path=self._out / "experts" / task,
            parameters={},
            dataset=DatasetSpec(**parts["train"], limit=self._rows),
            evaluation=EvaluationSpec(**parts["validation"], metric="accuracy"),
        )


def show(outcomes: Sequence[Outcome]) -> None:
    table = Table(title="auto on every combination, on held-out rows", title_justify="left")
    for column in ("tasks", "chosen", "mean / least", "best other", "ahead of it by (95 %)", "trials", "seconds"):
        table.add_column(column)
    for outcome in outcomes:
        chosen, other = outcome.chosen, outcome.best_other
        behind = other.behind
        ahead = f"{behind.value:+.4f} ({behind.interval[0]:+.4f} to {behind.interval[1]:+.4f})" if behind else "-"
        table.add_row(
            ", ".join(outcome.tasks),
            chosen.name,
            f"{chosen.mean_retention:.4f} / {chosen.min_retention:.4f}",
            f"{other.name} {other.mean_retention:.4f}",
            ahead,
            str(len(outcome.result.search.trials) if outcome.result.search else 0),
            f"{outcome.seconds:.0f}",
        )
    console.print(table)


def rows(outcomes: Sequence[Outcome], every: int, timed: Outcome | None) -> list[dict[str, Any]]:
    """What must be reached; `every` is the number of all tasks."""
    found = []
    targets = {**MEAN_TARGETS, every: ALL_TARGET}
    for size, target in targets.items():
        means = [o.chosen.mean_retention or 0.0 for o in outcomes if len(o.tasks) == size]
        others = [o.best_other.mean_retention or 0.0 for o in outcomes if len(o.tasks) == size]
        if means:
            ours, reference = float(np.mean(means)), float(np.mean(others))
            what = f"mean retention of {size} experts, against the best other candidate"
            found.append(_row(what, ours, reference, f">= {target}", ours >= target))
    if outcomes:
        beaten = sum(outcome.is_behind for outcome in outcomes)
        what = "combinations on which any candidate is beyond chance better than what was chosen, of all"
        found.append(_row(what, beaten, len(outcomes), "0", beaten == 0))
    if timed is not None:
        what = f"seconds of {TIMED_TRIALS} trials on {TIMED_EXPERTS} experts, measuring and publishing included"
        found.append(_row(what, timed.seconds, LONGEST_S, f"<= {LONGEST_S:g}", timed.seconds <= LONGEST_S))
    return found


def _row(what: str, ours: float, reference: float, target: str, met: bool) -> dict[str, Any]:
    ratio = ours / reference if reference else 0.0
    return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description="What auto finds, and what it costs.")
    parser.add_argument("--data", type=Path, help="folder that is searched for tasks besides the packaged ones")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="experts and statistics (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--trials", type=int, default=20, help="of each combination (%(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="of each task, to measure (%(default)s)")
    parser.add_argument("--validation-rows", type=int, default=800, help="to search and judge on (%(default)s)")
    parser.add_argument(
        "--only", type=int, nargs="*", help="sizes of the combinations, without the timing; none: the timing alone"
    )
    options = parser.parse_args()
    made = prepare(
        options.out,
        options.data,
        validation_rows=options.validation_rows,
        on_expert=lambda name, _: console.print(name),
    )
    tasks_of_all = list(made)
    searches = Searches(options.out, options.rows)
    timed = None
    if options.only is None or not options.only:
        with TemporaryDirectory() as fresh:
            timed = searches.search(tasks_of_all[:TIMED_EXPERTS], TIMED_TRIALS, Path(fresh))
        show([timed])
    outcomes = []
    for tasks in combinations_of(tasks_of_all):
        if options.only is None or len(tasks) in options.only:
            outcomes.append(searches.search(tasks, options.trials))
            show(outcomes[-1:])
    show(outcomes)
    shown(options.json, rows(outcomes, len(tasks_of_all), timed))


if __name__ == "__main__":
    main()
