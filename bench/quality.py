"""How much of each expert's accuracy a merge keeps, method by method, on rows that nobody has seen.

    python bench/quality.py --data DATA [--out OUT] [--json FILE] [--only SIZE ...] [--methods LABEL ...]

Trains the experts of bench/experts.py unless OUT has them, measures each once, merges all pairs, some triples, all
fours and all of them at once by every method, and evaluates every merge on held-out rows, with the experts' heads as
they were and with aligned heads. Controls have aligned heads too, but on a backbone that nobody merged: the common
ancestor, and another task's expert. What is predicted with each merge is kept in OUT, by everything that it follows
from: another run computes only what is new, or what other code merges now.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from pydantic import TypeAdapter
from rich.table import Table
from torch import Tensor

from bench.auto import Searches
from bench.combinations import Combination, combinations_of
from bench.experts import base_model_folder, prepare
from bench.outcomes import Kept, Outcome, OutcomeStore, code_digest
from bench.table import console, shown
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import ALIGN_RIDGE
from worker.engine.catalog.data.rows import Row, RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import (
    GRAM,
    METHODS,
    PARAMETER_FISHER,
    AlignedRegMeanParameters,
    Method,
    MethodParameters,
)
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.tasks import LabelMap
from worker.engine.checkpoints.reader import Digests
from worker.engine.evaluation.evaluate import head_inputs, head_of
from worker.engine.evaluation.metrics import BOOTSTRAP_RESAMPLES, bootstrap, interval
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.merging.backbone import Backbone
from worker.engine.merging.head_alignment import aligned
from worker.engine.merging.mergers import merged_state
from worker.engine.merging.methods import BUILDERS, REFITS, MeasuredModel
from worker.engine.merging.refits import comparison
from worker.engine.merging.refits import layer_alignment as layers
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime.device import best_device, resolve_precision, rounded_weights
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore
from worker.engine.search.splitting import halves
from worker.engine.tasks.metrics import Array

ASKED: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "published rule": {"name": "mask_fisher", "preset": "paper"},
    "mask_fisher": {"name": "mask_fisher"},
    "fisher": {"name": "fisher"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "task_arithmetic, scale 0.5": {"name": "task_arithmetic", "scale": 0.5},
    "ties": {"name": "ties"},
    "tsv_m": {"name": "tsv_m"},
    "wudi": {"name": "wudi"},
    "iso_c": {"name": "iso_c"},
    "iso_cts": {"name": "iso_cts"},
    "esm": {"name": "esm"},
    "regmean, gram deltas": {"name": "regmean", "gram": "deltas"},
    "regmean": {"name": "regmean"},
    "mask_regmean": {"name": "mask_regmean"},
    "regmean_plus": {"name": "regmean_plus"},
    "featcal": {"name": "featcal"},
    "featcal from tsv_m": {"name": "featcal", "start": {"name": "tsv_m"}},
    "aligned_regmean": {"name": "aligned_regmean"},
    "aligned_regmean from tsv_m": {"name": "aligned_regmean", "start": {"name": "tsv_m"}},
    "aligned_regmean from wudi": {"name": "aligned_regmean", "start": {"name": "wudi"}},
}
LABELED = {
    label: asked
    for label, asked in ASKED.items()
    if {asked["name"], asked.get("start", asked)["name"]} <= METHODS.keys()
}
"""All methods that are compared, by the labels of tables."""
FEW_ROWS = 96
FEW = f"regmean, {FEW_ROWS} rows"
AUTO = "auto"
OURS = (AUTO, "aligned_regmean")
RIVAL = "featcal"
LABELS = (*LABELED, FEW, AUTO)
CONTROLS = "controls"
SEED = 0
ANCESTOR = "the ancestor"
OTHER_EXPERT = "another task's expert"
REFITTED_ANCESTOR = "the ancestor, its layers refitted to all experts"
HEADS = ("kept", "aligned")
EVALUATION = 1
"""Number that is raised when this bench would predict otherwise with the same merge."""
SEARCH_SEED = 0
"""Seed of `auto`, which halves the held-out rows."""
SEARCH = "worker.engine.search.job"
METHOD: TypeAdapter[MethodParameters] = TypeAdapter(Method)


@dataclass
class Expert:
    """One task: its expert as it was, its rows, and a model whose backbone is replaced by the one to be evaluated."""

    name: str
    info: CheckpointInfo
    model: LoadedModel
    weight: Tensor
    bias: Tensor
    rows: list[Example]
    """To measure and to align on."""
    held_out: list[Example]
    outputs: Tensor
    """The expert's outputs on `rows`."""
    predicted: Array
    """The expert's predictions for `held_out`."""
    searched: frozenset[int] = frozenset()
    """Places of the held-out rows that `auto` searches on, so that it is not judged by them."""
    measured: dict[str, MeasuredModel] = field(default_factory=dict)
    """Statistics by method."""

    @property
    def labels(self) -> Array:
        return np.array([example.label for example in self.held_out], dtype=np.float64)

    def places(self, is_auto: bool) -> Array:
        """Return the places of held-out rows by which a method is judged: all, or those that `auto` did not see."""
        return np.array([i for i in range(len(self.held_out)) if not is_auto or i not in self.searched])

    def accuracy(self, is_auto: bool = False) -> float:
        places = self.places(is_auto)
        return float((self.predicted == self.labels)[places].mean())


Outcomes = dict[tuple[str, Combination], Kept]
"""Outcomes by method and combination."""
Controls = dict[str, Mapping[str, Outcome]]
"""Outcomes by what the backbone is, and then by task."""


class Bench:
    """Experts, their merges, and what is predicted with these.

    Args:
        rows: number of each task's rows to measure.
        validation_rows: most rows of a task that are held out.
        alignment_rows: number of each task's rows to align its head on; None: those that are measured.
    """

    def __init__(
        self,
        out: Path,
        data: Path | None,
        rows: int,
        validation_rows: int,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        alignment_rows: int | None = None,
    ) -> None:
        self.device = best_device()
        self.precision = resolve_precision(precision, self.device)
        self.rows = rows
        self.alignment_rows = alignment_rows or rows
        self.out = out
        self.base = inspect_checkpoint(base_model_folder(), "base")
        made = prepare(out, data, validation_rows=validation_rows, on_expert=lambda name, _: console.print(name))
        self.made_from = {name: found["made_from"] for name, found in made.items()}
        self.experts = {name: self._expert(name) for name in made}

    def _expert(self, name: str) -> Expert:
        info = inspect_checkpoint(self.out / "experts" / name, name)
        model = load(info, self.device)
        head = head_of(model)
        weight, bias = head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
        rows, held_out = (self._examples(model, name, part) for part in ("train", "validation"))
        outputs = self._features(model, rows) @ weight.T + bias
        predicted = (self._features(model, held_out) @ weight.T + bias).argmax(-1).double().numpy()
        searched, _ = halves(self.rows_of(name, "validation")[1], SEARCH_SEED, name)
        return Expert(name, info, model, weight, bias, rows, held_out, outputs, predicted, frozenset(searched))

    def _examples(self, model: LoadedModel, name: str, part: str) -> list[Example]:
        spec, rows = self.rows_of(name, part)
        return tokenize(rows, spec, model.tokenizer, model.max_length, LabelMap(model.task)).examples

    def rows_of(self, name: str, part: str) -> tuple[DatasetSpec, list[Row]]:
        path = self.out / "tasks" / name / f"{part}.jsonl"
        has_pairs = "text_pair" in json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
        spec = DatasetSpec(
            source=name, path=path, label="label", text_pair="text_pair" if has_pairs else None, max_length=128
        )
        return spec, sample(RowFile(spec), spec, max(self.rows, self.alignment_rows) if part == "train" else None)

    def _features(self, model: LoadedModel, examples: Sequence[Example]) -> Tensor:
        with rounded_weights(model.model, self.precision):
            return head_inputs(model, examples, self.precision, lambda _: None).double()

    def measure(self, method: MethodParameters, label: str, rows: int) -> None:
        """What the method needs of every expert, from OUT/statistics where it was measured before."""
        for expert in self.experts.values():
            expert.measured[label] = MeasuredModel(1.0)
            if method.statistics:
                plan = plan_merge([expert.info])
                measurer = Measurer(method, plan.linear_inputs, self.precision, self.store, BatchSizes())
                model = load(expert.info, self.device)  # the one at hand has another backbone by now
                spec, read = self.rows_of(expert.name, "train")
                own = Sample(read[:rows], min(len(read), self.rows), spec, model, LabelMap(model.task))
                digest = Digests().of_checkpoint(expert.info)
                found = measurer.measure(Measured(), model, digest, own, len(own), lambda _: None)
                expert.measured[label] = MeasuredModel(1.0, found.scores, found.of(GRAM), found.of(PARAMETER_FISHER))

    def merge(self, method: MethodParameters, label: str, tasks: Combination) -> dict[str, Tensor]:
        plan = plan_merge([self.experts[task].info for task in tasks], base=self.base)
        measured = [self.experts[task].measured[label] for task in tasks]
        return merged_state(method, measured, lambda: self._sides(tasks), plan, self.precision)

    def _sides(self, tasks: Sequence[str]) -> list[comparison.Expert]:
        """Load the experts of some tasks, to refit layers to."""
        experts = [self.experts[task] for task in tasks]
        return [
            comparison.Expert(load(expert.info, self.device), 1.0, expert.rows[: self.rows], expert.name)
            for expert in experts
        ]

    def evaluate(
        self, state: Mapping[str, Tensor], task: str, rows: int | None = None, ridge: float = ALIGN_RIDGE
    ) -> Outcome:
        expert = self.experts[task]
        expert.model.model.load_state_dict(state, strict=False)
        rows = rows or self.alignment_rows
        features, seen = (self._features(expert.model, e) for e in (expert.held_out, expert.rows[:rows]))
        kept = features @ expert.weight.T + expert.bias
        weight, bias = aligned(seen, expert.outputs[:rows], expert.weight, expert.bias, ridge)
        fitted = features @ weight.T + (0.0 if bias is None else bias)
        return Outcome(*(logits.argmax(-1).double().numpy() for logits in (kept, fitted)))

    def run(self, wanted: Sequence[str], only: Sequence[int] | None, trials: int) -> tuple[Outcomes, Controls]:
        """Merge and evaluate what is wanted. Of everything else there is what an earlier run kept.

        Args:
            wanted: labels of methods, and CONTROLS.
            only: sizes of combinations; None: all.
            trials: number of merges that `auto` tries, at least one of each candidate.
        """
        outcomes: Outcomes = {}
        self._kept = OutcomeStore(self.out / "outcomes")
        every = [tasks for tasks in combinations_of(list(self.experts)) if not only or len(tasks) in only]
        with StatisticsStore(self.out / "statistics", 10**11) as self.store:
            for label in LABELS:
                start = time.monotonic()
                for tasks in every:
                    if label == AUTO:
                        found = self._of_auto(tasks, trials, label in wanted)
                    else:
                        found = self._of_method(label, tasks, label in wanted)
                    if found is not None:
                        outcomes[label, tasks] = found
                if label in wanted:
                    console.print(f"{label}: {time.monotonic() - start:.0f} s", highlight=False)
            makers: dict[str, Callable[[], Mapping[str, Outcome]]] = {
                ANCESTOR: partial(self._controls, None),
                OTHER_EXPERT: partial(self._controls, 1),
                REFITTED_ANCESTOR: self._refitted_ancestor,
            }
            controls: Controls = {}
            for name, make in makers.items():
                asked = [name, self.alignment_rows]
                identity = self._identity(asked, self.experts, code_digest([layers.__name__]))
                made = self._found(identity, CONTROLS in wanted, partial(_timed, make))
                if made is not None:
                    controls[name] = made.by_task
        return outcomes, controls

    def _identity(self, what: Any, tasks: Iterable[str], code: str) -> Any:
        """Return everything that outcomes follow from, as JSON."""
        made_from = [[task, self.made_from[task]] for task in tasks]
        return [EVALUATION, what, made_from, self.rows, self.precision, code]

    def _found(self, identity: Any, is_wanted: bool, make: Callable[[], Kept]) -> Kept | None:
        """Return what is kept under an identity; if it is wanted and not there, make and keep it."""
        kept = self._kept.find(identity)
        if kept is None and is_wanted:
            kept = make()
            self._kept.keep(identity, kept)
        return kept

    def _of_method(self, label: str, tasks: Combination, is_wanted: bool) -> Kept | None:
        method, rows, aligned_on = self._method(label)

        def make() -> Kept:
            if any(label not in self.experts[task].measured for task in tasks):
                self.measure(method, label, rows)
            start = time.process_time()
            state = self.merge(method, label, tasks)
            seconds = time.process_time() - start
            return Kept({task: self.evaluate(state, task, aligned_on) for task in tasks}, seconds)

        asked = [method.model_dump(mode="json", exclude_unset=True), aligned_on]
        return self._found(self._identity(asked, tasks, code_digest(modules_of(method))), is_wanted, make)

    def _method(self, label: str) -> tuple[MethodParameters, int, int]:
        """Return a method with its parameters, and the numbers of rows that it measures and that heads align on."""
        rows, aligned_on = (FEW_ROWS, FEW_ROWS) if label == FEW else (self.rows, self.alignment_rows)
        asked = {"name": "regmean"} if label == FEW else LABELED[label]
        measures = METHOD.validate_python(asked).most_examples > 0
        return METHOD.validate_python({**asked, **({"examples": rows} if measures else {})}), rows, aligned_on

    def _of_auto(self, tasks: Combination, trials: int, is_wanted: bool) -> Kept | None:
        """Let the service's engine search, on a half of the held-out rows, and evaluate the merge that it publishes."""
        searches = Searches(self.out, self.rows, self.precision, self.alignment_rows)
        method = searches.method(len(tasks), trials)
        asked = [method, self.alignment_rows]

        def make() -> Kept:
            outcomes: dict[str, Outcome] = {}
            seconds = [time.process_time()]

            def evaluate(folder: Path, result: MergeResult) -> None:
                seconds.append(time.process_time())
                [chosen] = [line for line in result.candidates or () if line.chosen]
                merged = load(inspect_checkpoint(folder / "models" / tasks[0], AUTO), self.device)
                head = merged.family.head.logits
                state = {name: t for name, t in merged.model.state_dict().items() if not name.startswith(f"{head}.")}
                ridge = ALIGN_RIDGE if chosen.align_ridge is None else chosen.align_ridge
                outcomes.update({task: self.evaluate(state, task, ridge=ridge) for task in tasks})

            found = searches.search(tasks, trials, on_published=evaluate)
            return Kept(outcomes, seconds[1] - seconds[0], found.chosen.name)

        modules = {
            module for name in method["candidates"] for module in modules_of(METHOD.validate_python({"name": name}))
        }
        return self._found(self._identity(asked, tasks, code_digest({SEARCH, *modules})), is_wanted, make)

    def _refitted_ancestor(self) -> dict[str, Outcome]:
        """All tasks at once by the refit of `aligned_regmean` alone, which starts from the ancestor instead."""
        method = AlignedRegMeanParameters(examples=self.rows)
        ancestor = METHOD.validate_python({"name": "average", "scale": 0.0})
        tasks = list(self.experts)
        plan = plan_merge([self.experts[task].info for task in tasks], base=self.base)
        start = self.state(plan, ancestor, [MeasuredModel(1.0)] * len(tasks))
        state = REFITS[method.name](plan, start, self._sides(tasks), method, self.precision, lambda: None)
        return {task: self.evaluate(state, task) for task in self.experts}

    @staticmethod
    def state(plan: MergePlan, method: MethodParameters, models: list[MeasuredModel]) -> dict[str, Tensor]:
        with Backbone(
            plan, [True] * len(models), BUILDERS[method.name](method, models), partial(method.at, "scale")
        ) as backbone:
            return backbone.state()

    def _controls(self, shift: int | None) -> dict[str, Outcome]:
        """Evaluate the heads on the ancestor's backbone, or on that of the expert so many places further; by task."""
        names = list(self.experts)
        found = {}
        for place, task in enumerate(names):
            source = self.experts[names[(place + shift) % len(names)]].info if shift else self.experts[task].info
            method = METHOD.validate_python({"name": "average", "scale": 1.0 if shift else 0.0})
            plan = plan_merge([source], base=self.base)
            with Backbone(
                plan, [True], BUILDERS["average"](method, [MeasuredModel(1.0)]), partial(method.at, "scale")
            ) as backbone:
                found[task] = self.evaluate(backbone.state(), task)
        return found


def _timed(make: Callable[[], Mapping[str, Outcome]]) -> Kept:
    """Make outcomes, and take the time."""
    start = time.process_time()
    return Kept(make(), time.process_time() - start)


def modules_of(method: MethodParameters) -> list[str]:
    """Return the names of the modules that define a method."""
    functions = [builders[method.name] for builders in (BUILDERS, REFITS) if method.name in builders]
    start = getattr(method, "start", None)
    of_start = modules_of(start) if isinstance(start, MethodParameters) else []
    return [type(method).__module__, *(function.__module__ for function in functions), *of_start]


@dataclass(frozen=True)
class Compared:
    """Mean retention of one method minus that of another, with its 95 % interval."""

    value: float
    interval: tuple[float, float]

    @property
    def is_below(self) -> bool:
        """Whether the one is below the other by more than chance."""
        return self.interval[1] < 0


class Report:
    """The numbers of all outcomes, and whether they reach what they must.

    Retention under a method is that of all held-out rows, and under `auto` that of the rows that it did not search on.
    """

    def __init__(self, experts: Mapping[str, Expert], outcomes: Outcomes, controls: Controls) -> None:
        self.experts = experts
        self.outcomes = outcomes
        self.controls = controls
        self.sizes = sorted({len(tasks) for _, tasks in outcomes})
        self.labels = list(dict.fromkeys(label for label, _ in outcomes))
        self.combinations = {n: sorted({tasks for _, tasks in outcomes if len(tasks) == n}) for n in self.sizes}
        self._draws: dict[tuple[str, bool], dict[tuple[str, Combination, str], Array]] = {}

    def retention(self, task: str, predicted: Array, is_auto: bool = False) -> float:
        expert, places = self.experts[task], self.experts[task].places(is_auto)
        return float((predicted == expert.labels)[places].mean()) / expert.accuracy(is_auto)

    def retentions(self, label: str, tasks: Combination, head: str, is_auto: bool | None = None) -> list[float]:
        """Return the retention of each task; `is_auto`: on the rows that `auto` is judged by."""
        half = label == AUTO if is_auto is None else is_auto
        by_task = self.outcomes[label, tasks].by_task
        return [self.retention(task, getattr(by_task[task], head), half) for task in tasks]

    def has(self, label: str, size: int) -> bool:
        """Return whether a method merged all combinations of a size."""
        return size in self.sizes and all((label, tasks) in self.outcomes for tasks in self.combinations[size])

    def mean(self, label: str, size: int, head: str, is_auto: bool | None = None) -> float:
        """Compute the mean over the combinations of one size of the mean retention over their tasks."""
        of_size = self.combinations[size]
        return float(np.mean([np.mean(self.retentions(label, tasks, head, is_auto)) for tasks in of_size]))

    def overall(self, label: str, head: str) -> float:
        """Compute the mean over all combinations."""
        of_method = [tasks for name, tasks in self.outcomes if name == label]
        return float(np.mean([np.mean(self.retentions(label, tasks, head)) for tasks in of_method]))

    def lowest(self, label: str, size: int, head: str) -> float:
        return min(min(self.retentions(label, tasks, head)) for tasks in self.combinations[size])

    def cost(self, label: str) -> float | None:
        """Compute the CPU time of a method's merges as a multiple of that of `regmean`, of the same combinations."""
        both = [tasks for name, tasks in self.outcomes if name == label and ("regmean", tasks) in self.outcomes]
        if not both:
            return None
        ours, reference = (sum(self.outcomes[name, tasks].seconds for tasks in both) for name in (label, "regmean"))
        return ours / reference

    def of_control(self, name: str, head: str) -> list[float]:
        return [self.retention(task, getattr(outcome, head)) for task, outcome in self.controls[name].items()]

    # --- tables -------------------------------------------------------------------------------------------

    def show(self) -> None:
        table = Table(title="Experts", title_justify="left")
        for column in ("task", "labels", "held-out rows", "accuracy"):
            table.add_column(column)
        for name, expert in self.experts.items():
            table.add_row(name, str(len(expert.weight)), str(len(expert.held_out)), f"{expert.accuracy():.4f}")
        console.print(table)
        for head in HEADS:
            self._show_retention(head)
        for ours, head in product(OURS, HEADS):
            if ours in self.labels:
                self._show_differences(ours, head)
        chosen = [(tasks, kept.chosen) for (label, tasks), kept in self.outcomes.items() if label == AUTO]
        for tasks, name in chosen:
            console.print(f"auto on {'+'.join(tasks)}: {name}", highlight=False)

    def _show_retention(self, head: str) -> None:
        table = Table(title=f"Retention, mean / lowest, heads {head}", title_justify="left")
        table.add_column("method")
        for size in self.sizes:
            table.add_column(f"{size} tasks ({len(self.combinations[size])} combinations)", justify="right")
        table.add_column("CPU time, times regmean", justify="right")
        for label in self.labels:
            cells = [
                f"{self.mean(label, size, head):.3f} / {self.lowest(label, size, head):.3f}"
                if self.has(label, size)
                else ""
                for size in self.sizes
            ]
            cost = self.cost(label)
            table.add_row(label, *cells, "" if cost is None else f"{cost:.3g}")
        for name in self.controls:
            control = self.of_control(name, head)
            table.add_row(f"control: {name}", f"{np.mean(control):.3f} / {min(control):.3f}")
        console.print(table)

    def _show_differences(self, ours: str, head: str) -> None:
        table = Table(title=f"{ours} minus each other method, heads {head}", title_justify="left")
        for column in ("method", "combinations", "mean (95 % interval)", "significantly below", "significantly above"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for label in self.labels:
            both = self.shared(ours, label)
            if label == ours or not both:
                continue
            mean = self.compared(ours, label, head, both)
            low, high = mean.interval
            below = sum(self.compared(ours, label, head, [tasks]).is_below for tasks in both)
            above = sum(self.compared(label, ours, head, [tasks]).is_below for tasks in both)
            told = f"{mean.value:+.4f} ({low:+.4f} to {high:+.4f})"
            table.add_row(label, str(len(both)), told, str(below), str(above))
        console.print(table)

    # --- paired differences -------------------------------------------------------------------------------

    def shared(self, ours: str, other: str) -> list[Combination]:
        """Return the combinations that both methods merged."""
        return [tasks for name, tasks in self.outcomes if name == ours and (other, tasks) in self.outcomes]

    def compared(self, ours: str, reference: str, head: str, combinations: Sequence[Combination]) -> Compared:
        """Compare the mean retention over combinations, by a paired bootstrap.

        Both are judged by the same rows, and a task's rows are drawn once for all combinations. Against `auto`, these
        are the rows that it did not search on.
        """
        half = AUTO in (ours, reference)
        one, other = (
            float(np.mean([np.mean(self.retentions(label, tasks, head, half)) for tasks in combinations]))
            for label in (ours, reference)
        )
        total = np.zeros(BOOTSTRAP_RESAMPLES)
        for tasks in combinations:
            for task in tasks:
                draws, scale = self._drawn(task, half), self.experts[task].accuracy(half) * len(tasks)
                total += (draws[ours, tasks, head] - draws[reference, tasks, head]) / scale / len(combinations)
        return Compared(one - other, interval(total))

    def _drawn(self, task: str, half: bool) -> dict[tuple[str, Combination, str], Array]:
        """Return the accuracy of every merge on the same resamples of a task's rows."""
        if (task, half) not in self._draws:
            expert, places = self.experts[task], self.experts[task].places(half)
            keys = [(*key, head) for key in self.outcomes for head in HEADS if task in key[1]]
            predicted = [getattr(self.outcomes[label, of].by_task[task], head)[places] for label, of, head in keys]
            seed = list(self.experts).index(task)  # of tasks with as many rows each draws its own
            draws = bootstrap("accuracy", expert.model.task, expert.labels[places], predicted, seed)
            self._draws[task, half] = dict(zip(keys, draws, strict=True))
        return self._draws[task, half]

    # --- targets ------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """What must be reached, as rows of the bench's JSON; of methods and sizes that were merged."""
        return [*self._rows_of_scores(), *self._rows_of_alignment(), *self._rows_of_ours(), *self._rows_of_regression()]

    def _rows_of_scores(self) -> Iterator[dict[str, Any]]:
        if not all(self.has(label, 2) for label in ("mask_fisher", "average", "published rule")):
            return
        ours, average, rule = (self.mean(label, 2, "kept") for label in ("mask_fisher", "average", "published rule"))
        yield _row("mask_fisher, heads kept, pairs, against the average", ours, average, "above", ours > average)
        what = "mask_fisher, heads kept, pairs, against the published rule"
        yield _row(what, ours, rule, "6.5 points above", ours - rule >= 0.065)

    def _rows_of_alignment(self) -> Iterator[dict[str, Any]]:
        larger = [(label, tasks) for label, tasks in self.outcomes if len(tasks) >= 3]
        if larger:
            gains = [
                (float(np.mean(self.retentions(*key, "aligned"))), float(np.mean(self.retentions(*key, "kept"))))
                for key in larger
            ]
            least = min(gains, key=lambda gain: gain[0] - gain[1])
            what = "aligned against kept heads, three tasks and more, least gain"
            yield _row(what, *least, "above", least[0] > least[1])
            losing = [(label, of, task) for label, of in larger for task in of if self.loses(label, of, task)]
            for label, tasks, task in losing:
                console.print(f"{task} loses by alignment: {label}, {'+'.join(tasks)}")
            checked = sum(len(tasks) for _, tasks in larger)
            what = "tasks that alignment costs more than their interval"
            yield _row(what, len(losing), checked, "none", not losing)
        lowest, label = min((float(np.mean(self.retentions(*key, "aligned"))), key[0]) for key in self.outcomes)
        for name in (ANCESTOR, OTHER_EXPERT):
            if name in self.controls:
                control = float(np.mean(self.of_control(name, "aligned")))
                what = f"control: aligned heads on {name}, against the lowest merge ({label})"
                yield _row(what, control, lowest, "below", control < lowest)
        if REFITTED_ANCESTOR in self.controls and self.has("aligned_regmean", self.sizes[-1]):
            refitted = float(np.mean(self.of_control(REFITTED_ANCESTOR, "aligned")))
            ours = self.mean("aligned_regmean", self.sizes[-1], "aligned")
            what = "aligned_regmean, all tasks, against the same refit of the ancestor"
            yield _row(what, ours, refitted, "above", ours > refitted)

    def _rows_of_ours(self) -> Iterator[dict[str, Any]]:
        """Our best method against what must be reached, and ours against the methods of others."""
        targets = {2: 0.99, 4: 0.99} | {size: 0.98 for size in self.sizes if size >= 5}
        for size, target in targets.items():
            complete = [label for label in self.labels if self.has(label, size)]
            if complete:
                best = max(complete, key=lambda label: self.mean(label, size, "aligned"))
                value = self.mean(best, size, "aligned")
                yield _row(
                    f"best with aligned heads, {size} tasks ({best})", value, target, f"{target}", value >= target
                )
        for ours, size, head in product(OURS, (3, 4), HEADS):
            if self.has(ours, size) and self.has(RIVAL, size):
                found = self.compared(ours, RIVAL, head, self.combinations[size])
                value = self.mean(ours, size, head)
                low, high = found.interval
                what = f"{ours} against {RIVAL}, {size} tasks, heads {head}; difference {low:+.4f} to {high:+.4f}"
                yield _row(what, value, value - found.value, "above", found.value > 0)
        for ours, head in product(OURS, HEADS):
            others = [(label, tasks) for label in self.labels if label != ours for tasks in self.shared(ours, label)]
            behind = [key for key in others if self.compared(ours, key[0], head, [key[1]]).is_below]
            if others:
                for label, tasks in behind:
                    console.print(f"{ours} is behind {label}, heads {head}: {'+'.join(tasks)}")
                what = f"methods on combinations that {ours} is significantly below, heads {head}"
                yield _row(what, len(behind), len(others), "none", not behind)

    def _rows_of_regression(self) -> Iterator[dict[str, Any]]:
        for method, head in product(("mask_regmean", "aligned_regmean"), HEADS):
            both = self.shared(method, "regmean")
            if both:
                found = self.compared(method, "regmean", head, both)
                reference = float(np.mean([np.mean(self.retentions("regmean", tasks, head)) for tasks in both]))
                what = f"{method} against regmean, heads {head}, all combinations"
                yield _row(what, reference + found.value, reference, "within its interval or above", not found.is_below)
        for size in self.sizes:
            if self.has(FEW, size) and self.has("regmean", size):
                few, many = (self.mean(label, size, "aligned") for label in (FEW, "regmean"))
                what = f"regmean, aligned, {FEW_ROWS} rows against more, {size} tasks"
                yield _row(what, few, many, "within 2 points", many - few <= 0.02)

    def loses(self, label: str, tasks: Combination, task: str) -> bool:
        """Return whether the aligned head is worse by more than chance, by paired bootstrap."""
        draws = self._drawn(task, label == AUTO)
        return interval(draws[label, tasks, "aligned"] - draws[label, tasks, "kept"])[1] < 0


def _row(what: str, ours: float, reference: float, target: str, met: bool) -> dict[str, Any]:
    ratio = ours / reference if reference else None
    return {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": bool(met)}


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of each expert's accuracy a merge keeps.")
    parser.add_argument("--data", type=Path, help="folder that is searched for tasks besides the packaged ones")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="experts and what follows (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--rows", type=int, default=512, help="of each task, to measure (%(default)s)")
    parser.add_argument("--alignment-rows", type=int, help="of each task, to align its head on (as --rows)")
    parser.add_argument("--validation-rows", type=int, default=800, help="held out, at most (%(default)s)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(%(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="sizes of the combinations (all)")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=(*LABELS, CONTROLS),
        default=(*LABELS, CONTROLS),
        metavar="LABEL",
        help=f"what is computed ({', '.join((*LABELS, CONTROLS))}); of others, what an earlier run kept is shown",
    )
    parser.add_argument("--trials", type=int, default=20, help="of auto for each combination (%(default)s)")
    options = parser.parse_args()
    bench = Bench(
        options.out, options.data, options.rows, options.validation_rows, options.precision, options.alignment_rows
    )
    report = Report(bench.experts, *bench.run(options.methods, options.only, options.trials))
    report.show()
    shown(options.json, report.rows())


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
