"""How much of each expert's accuracy a merge keeps, method by method, on rows that nobody has seen.

    python bench/quality.py --data DATA [--out OUT] [--json FILE] [--rows N] [--validation-rows N]

Trains the experts of bench/experts.py unless OUT has them, measures each once, merges all pairs, some triples and fours
and all of them at once by every method, and evaluates every merge on held-out rows, with the experts' heads as they
were and with aligned heads. Controls have aligned heads too, but on a backbone that nobody merged: the common
ancestor, and another task's expert.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from pydantic import TypeAdapter
from rich.table import Table
from torch import Tensor

from bench.experts import base_model_folder, prepare
from bench.table import console, shown
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import Row, RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import (
    GRAM,
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
from worker.engine.evaluation.metrics import BOOTSTRAP_RESAMPLES, bootstrap
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.merging import layer_alignment as layers
from worker.engine.merging.backbone import Backbone
from worker.engine.merging.head_alignment import aligned
from worker.engine.merging.methods import BUILDERS, REFITS, MeasuredModel
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime.device import best_device, resolve_precision
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore
from worker.engine.tasks.metrics import Array

METHODS: dict[str, dict[str, Any]] = {
    "average": {"name": "average"},
    "published rule": {"name": "mask_fisher", "preset": "paper"},
    "mask_fisher": {"name": "mask_fisher"},
    "fisher": {"name": "fisher"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "ties": {"name": "ties"},
    "regmean": {"name": "regmean"},
    "mask_regmean": {"name": "mask_regmean"},
    "aligned_regmean": {"name": "aligned_regmean"},
}
FEW_ROWS = 96
FEW = f"regmean, {FEW_ROWS} rows"
MOST_TRIPLES = 6
MOST_FOURS = 3
SEED = 0
ANCESTOR = "the ancestor"
OTHER_EXPERT = "another task's expert"
REFITTED_ANCESTOR = "the ancestor, its layers refitted to all experts"
HEADS = ("kept", "aligned")
Combination = tuple[str, ...]
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
    measured: dict[str, MeasuredModel] = field(default_factory=dict)
    """Statistics by method."""

    @property
    def labels(self) -> Array:
        return np.array([example.label for example in self.held_out], dtype=np.float64)

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.labels).mean())


@dataclass(frozen=True)
class Outcome:
    """What one backbone makes of one task's held-out rows, with the expert's own head and with it aligned."""

    kept: Array
    aligned: Array


Outcomes = dict[tuple[str, Combination], dict[str, Outcome]]
"""Outcomes by method and combination, and then by task."""
Controls = dict[str, dict[str, Outcome]]
"""Outcomes by what the backbone is, and then by task."""


class Bench:
    def __init__(self, out: Path, data: Path | None, rows: int, validation_rows: int) -> None:
        self.device = best_device()
        self.precision = resolve_precision("auto", self.device)
        self.rows = rows
        self.out = out
        self.base = inspect_checkpoint(base_model_folder(), "base")
        made = prepare(out, data, validation_rows=validation_rows, on_expert=lambda name, _: console.print(name))
        self.experts = {name: self._expert(name) for name in made}

    def _expert(self, name: str) -> Expert:
        info = inspect_checkpoint(self.out / "experts" / name, name)
        model = load(info, self.device)
        head = head_of(model)
        weight, bias = head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
        rows, held_out = (self._examples(model, name, part) for part in ("train", "validation"))
        outputs = self._features(model, rows) @ weight.T + bias
        predicted = (self._features(model, held_out) @ weight.T + bias).argmax(-1).double().numpy()
        return Expert(name, info, model, weight, bias, rows, held_out, outputs, predicted)

    def _examples(self, model: LoadedModel, name: str, part: str) -> list[Example]:
        spec, rows = self.rows_of(name, part)
        return tokenize(rows, spec, model.tokenizer, model.max_length, LabelMap(model.task)).examples

    def rows_of(self, name: str, part: str) -> tuple[DatasetSpec, list[Row]]:
        path = self.out / "tasks" / name / f"{part}.jsonl"
        has_pairs = "text_pair" in json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
        spec = DatasetSpec(
            source=name, path=path, label="label", text_pair="text_pair" if has_pairs else None, max_length=128
        )
        return spec, sample(RowFile(spec), spec, self.rows if part == "train" else None)

    def _features(self, model: LoadedModel, examples: Sequence[Example]) -> Tensor:
        return head_inputs(model, examples, self.precision, lambda _: None)

    def measure(self, method: MethodParameters, label: str, rows: int) -> None:
        """What the method needs of every expert, from OUT/statistics where it was measured before."""
        for expert in self.experts.values():
            expert.measured[label] = MeasuredModel(1.0)
            if method.statistics:
                plan = plan_merge([expert.info])
                measurer = Measurer(method, plan.linear_inputs, self.precision, self.store, BatchSizes())
                model = load(expert.info, self.device)  # the one at hand has another backbone by now
                spec, read = self.rows_of(expert.name, "train")
                own = Sample(read[:rows], len(read), spec, model, LabelMap(model.task))
                digest = Digests().of_checkpoint(expert.info)
                found = measurer.measure(Measured(), model, digest, own, len(own), lambda _: None)
                expert.measured[label] = MeasuredModel(1.0, found.scores, found.of(GRAM), found.of(PARAMETER_FISHER))

    def merge(self, method: MethodParameters, label: str, tasks: Combination) -> dict[str, Tensor]:
        experts = [self.experts[task] for task in tasks]
        plan = plan_merge([expert.info for expert in experts], base=self.base)
        start = self.state(plan, method, [expert.measured[label] for expert in experts])
        return self._aligned(method, plan, experts, start) if method.refits_layers else start

    def _aligned(
        self, method: MethodParameters, plan: MergePlan, experts: Sequence[Expert], start: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The start with its linear layers refitted."""
        sides = [
            layers.Expert(load(expert.info, self.device), 1.0, expert.rows[: self.rows], expert.name)
            for expert in experts
        ]
        return REFITS[method.name](plan, start, sides, method, self.precision, lambda: None)

    def evaluate(self, state: Mapping[str, Tensor], task: str, rows: int | None = None) -> Outcome:
        expert = self.experts[task]
        expert.model.model.load_state_dict(state, strict=False)
        features, seen = (self._features(expert.model, e) for e in (expert.held_out, expert.rows[:rows]))
        kept = features @ expert.weight.T + expert.bias
        weight, bias = aligned(seen, expert.outputs[:rows], expert.weight, expert.bias)
        fitted = features @ weight.T + (0.0 if bias is None else bias)
        return Outcome(*(logits.argmax(-1).double().numpy() for logits in (kept, fitted)))

    def run(self) -> tuple[Outcomes, Controls]:
        outcomes: Outcomes = {}
        methods = {
            label: METHOD.validate_python({**asked, **self._examples_of(asked)}) for label, asked in METHODS.items()
        }
        methods[FEW] = METHOD.validate_python({"name": "regmean", "examples": FEW_ROWS})
        with StatisticsStore(self.out / "statistics", 10**11) as self.store:
            for label, method in methods.items():
                start = time.monotonic()
                rows = FEW_ROWS if label == FEW else self.rows
                self.measure(method, label, rows)
                for tasks in combinations_of(list(self.experts)):
                    state = self.merge(method, label, tasks)
                    outcomes[label, tasks] = {task: self.evaluate(state, task, rows) for task in tasks}
                console.print(f"{label}: {time.monotonic() - start:.0f} s", highlight=False)
            controls = {
                ANCESTOR: self._controls(None),
                OTHER_EXPERT: self._controls(1),
                REFITTED_ANCESTOR: self._refitted_ancestor(),
            }
        return outcomes, controls

    def _examples_of(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        measures = asked["name"] not in ("average", "task_arithmetic", "ties")
        return {"examples": self.rows} if measures else {}

    def _refitted_ancestor(self) -> dict[str, Outcome]:
        """All tasks at once by the refit of `aligned_regmean` alone, which starts from the ancestor instead."""
        method = AlignedRegMeanParameters(examples=self.rows)
        ancestor = METHOD.validate_python({"name": "average", "scale": 0.0})
        experts = list(self.experts.values())
        plan = plan_merge([expert.info for expert in experts], base=self.base)
        start = self.state(plan, ancestor, [MeasuredModel(1.0)] * len(experts))
        state = self._aligned(method, plan, experts, start)
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


def combinations_of(tasks: Sequence[str]) -> Iterator[Combination]:
    """All pairs, some triples and fours in which every task is about as often, and all of them."""
    for size, most in ((2, None), (3, MOST_TRIPLES), (4, MOST_FOURS)):
        every = list(combinations(tasks, size)) if size < len(tasks) else []
        step = 1 if most is None else math.ceil(len(every) / most)
        yield from every[::step] if step else ()
    yield tuple(tasks)


class Report:
    """The numbers of all outcomes, and whether they reach what they must."""

    def __init__(self, experts: Mapping[str, Expert], outcomes: Outcomes, controls: Controls) -> None:
        self.experts = experts
        self.outcomes = outcomes
        self.controls = controls
        self.sizes = sorted({len(tasks) for _, tasks in outcomes})
        self.labels = list(dict.fromkeys(label for label, _ in outcomes))

    def retention(self, task: str, predicted: Array) -> float:
        expert = self.experts[task]
        return float((predicted == expert.labels).mean()) / expert.accuracy

    def retentions(self, label: str, tasks: Combination, head: str) -> list[float]:
        return [self.retention(task, getattr(o, head)) for task, o in self.outcomes[label, tasks].items()]

    def mean(self, label: str, size: int, head: str) -> float:
        """Mean over the combinations of one size of the mean retention over their tasks."""
        of_size = [tasks for name, tasks in self.outcomes if name == label and len(tasks) == size]
        return float(np.mean([np.mean(self.retentions(label, tasks, head)) for tasks in of_size]))

    def overall(self, label: str, head: str) -> float:
        """Mean over all combinations."""
        of_method = [tasks for name, tasks in self.outcomes if name == label]
        return float(np.mean([np.mean(self.retentions(label, tasks, head)) for tasks in of_method]))

    def lowest(self, label: str, size: int, head: str) -> float:
        of_size = [tasks for name, tasks in self.outcomes if name == label and len(tasks) == size]
        return min(min(self.retentions(label, tasks, head)) for tasks in of_size)

    def of_control(self, name: str, head: str) -> list[float]:
        return [self.retention(task, getattr(outcome, head)) for task, outcome in self.controls[name].items()]

    def show(self) -> None:
        table = Table(title="Experts", title_justify="left")
        for column in ("task", "labels", "held-out rows", "accuracy"):
            table.add_column(column)
        for name, expert in self.experts.items():
            table.add_row(name, str(len(expert.weight)), str(len(expert.held_out)), f"{expert.accuracy:.4f}")
        console.print(table)
        counts = {n: len({tasks for _, tasks in self.outcomes if len(tasks) == n}) for n in self.sizes}
        for head in HEADS:
            table = Table(title=f"Retention, mean / lowest, heads {head}", title_justify="left")
            table.add_column("method")
            for size in self.sizes:
                table.add_column(f"{size} tasks ({counts[size]} combinations)", justify="right")
            for label in self.labels:
                both = [(self.mean(label, size, head), self.lowest(label, size, head)) for size in self.sizes]
                table.add_row(label, *(f"{mean:.3f} / {low:.3f}" for mean, low in both))
            for name in self.controls:
                control = self.of_control(name, head)
                table.add_row(f"control: {name}", f"{np.mean(control):.3f} / {min(control):.3f}")
            console.print(table)

    def rows(self) -> list[dict[str, Any]]:
        """What must be reached, as rows of the bench's JSON."""
        found = []

        def row(what: str, ours: float, reference: float, target: str, met: bool) -> None:
            ratio = ours / reference if reference else None
            found.append(
                {"what": what, "ours": ours, "reference": reference, "ratio": ratio, "target": target, "met": bool(met)}
            )

        of_pairs = {label: self.mean(label, 2, "kept") for label in self.labels}
        ours = of_pairs["mask_fisher"]
        row("mask_fisher, heads kept, pairs, against the average", ours, of_pairs["average"], "above",
            ours > of_pairs["average"])  # fmt: skip
        row("mask_fisher, heads kept, pairs, against the published rule", ours, of_pairs["published rule"],
            "6.5 points above", ours - of_pairs["published rule"] >= 0.065)  # fmt: skip
        larger = [(label, tasks) for label, tasks in self.outcomes if len(tasks) >= 3]
        gains = [
            (float(np.mean(self.retentions(*key, "aligned"))), float(np.mean(self.retentions(*key, "kept"))))
            for key in larger
        ]
        least = min(gains, key=lambda gain: gain[0] - gain[1])
        row("aligned against kept heads, three tasks and more, least gain", *least, "above", least[0] > least[1])
        losing = [(label, tasks, task) for label, tasks in larger for task in tasks if self.loses(label, tasks, task)]
        checked = sum(len(tasks) for _, tasks in larger)
        for label, tasks, task in losing:
            console.print(f"{task} loses by alignment: {label}, {'+'.join(tasks)}")
        row("tasks that alignment costs more than their interval", len(losing), checked, "none", not losing)
        lowest, label = min((float(np.mean(self.retentions(*key, "aligned"))), key[0]) for key in self.outcomes)
        for name in (ANCESTOR, OTHER_EXPERT):
            control = float(np.mean(self.of_control(name, "aligned")))
            row(f"control: aligned heads on {name}, against the lowest merge ({label})", control, lowest, "below",
                control < lowest)  # fmt: skip
        refitted = float(np.mean(self.of_control(REFITTED_ANCESTOR, "aligned")))
        row("aligned_regmean, all tasks, against the same refit of the ancestor",
            self.mean("aligned_regmean", self.sizes[-1], "aligned"), refitted, "above",
            self.mean("aligned_regmean", self.sizes[-1], "aligned") > refitted)  # fmt: skip
        targets = {2: 0.99, 4: 0.985} | {size: 0.97 for size in self.sizes if size >= 5}
        for size, target in targets.items():
            if size in self.sizes:
                best = max(self.labels, key=lambda label: self.mean(label, size, "aligned"))
                value = self.mean(best, size, "aligned")
                row(f"best with aligned heads, {size} tasks ({best})", value, target, f"{target}", value >= target)
        for method, head in product(("mask_regmean", "aligned_regmean"), HEADS):
            ours, reference = (self.overall(label, head) for label in (method, "regmean"))
            _, high = self.difference(method, "regmean", head)
            row(f"{method} against regmean, heads {head}, all combinations", ours, reference,
                "within its interval or above", high >= 0)  # fmt: skip
        for size in self.sizes:
            few, many = (self.mean(label, size, "aligned") for label in (FEW, "regmean"))
            row(f"regmean, aligned, {FEW_ROWS} rows against more, {size} tasks", few, many, "within 2 points",
                many - few <= 0.02)  # fmt: skip
        return found

    def loses(self, label: str, tasks: Combination, task: str) -> bool:
        """Whether the aligned head is worse by more than chance, by paired bootstrap."""
        outcome, expert = self.outcomes[label, tasks][task], self.experts[task]
        aligned_, kept = bootstrap("accuracy", expert.model.task, expert.labels, [outcome.aligned, outcome.kept], SEED)
        return float(np.quantile(aligned_ - kept, 0.975)) < 0

    def difference(self, ours: str, reference: str, head: str) -> tuple[float, float]:
        """The 95 % interval of the difference of mean retentions over all combinations; the same rows for both, and
        for a task's rows in all combinations."""
        total = np.zeros(BOOTSTRAP_RESAMPLES)
        all_tasks = [tasks for name, tasks in self.outcomes if name == ours]
        for tasks in all_tasks:
            for task in tasks:
                expert = self.experts[task]
                both = [getattr(self.outcomes[label, tasks][task], head) for label in (ours, reference)]
                seed = list(self.experts).index(task)  # of tasks with as many rows each draws its own
                one, other = bootstrap("accuracy", expert.model.task, expert.labels, both, seed)
                total += (one - other) / expert.accuracy / len(tasks) / len(all_tasks)
        low, high = np.quantile(total, [0.025, 0.975])
        return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of each expert's accuracy a merge keeps.")
    parser.add_argument("--data", type=Path, help="folder that is searched for tasks besides the packaged ones")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="experts and statistics (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--rows", type=int, default=512, help="of each task, to measure and align on (%(default)s)")
    parser.add_argument("--validation-rows", type=int, default=800, help="held out, at most (%(default)s)")
    options = parser.parse_args()
    bench = Bench(options.out, options.data, options.rows, options.validation_rows)
    report = Report(bench.experts, *bench.run())
    report.show()
    shown(options.json, report.rows())


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
