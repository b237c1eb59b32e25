"""The protocol of *Fisher Mask Nodes for Language Model Merging* (arXiv 2403.09891), run through the service.

    python bench/reproduce_paper.py --models bert-tiny=hub:M-FAC/bert-tiny-finetuned-{task} [--tasks TASK ...]
    python bench/reproduce_paper.py --data DATA [--out OUT] [--json FILE]

Experts of one model, each fine-tuned for a task of GLUE, are merged in pairs by the plain average, by full-scale Fisher
averaging, by the published rule for mask nodes and by this project's, with 128 and with 2,048 rows of each task. Both
tasks are evaluated, each with its expert's own head as it is. The tables have the paper's form: the mean of a pair's
two metrics, and the time that measuring an expert takes.

`--models NAME=REFERENCE` names the experts of a model, with `{task}` where the task's name stands: on the hub, or in a
folder below the current one (`local:`). Rows are those of `hub:nyu-mll/glue`. With `--data` instead, bench/experts.py
trains the experts on the tasks of that folder. What is done is kept under OUT, and another run goes on from there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.table import Table

from app.client import Client
from bench.experts import prepare
from bench.servers import started
from bench.table import console, shown
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult

Fields = Mapping[str, Any]

GLUE: Final[Mapping[str, Fields]] = {
    "cola": {"text": "sentence", "metric": "matthews_correlation"},
    "mnli": {"text": "premise", "text_pair": "hypothesis", "validation": "validation_matched"},
    "mrpc": {"text": "sentence1", "text_pair": "sentence2"},
    "qnli": {"text": "question", "text_pair": "sentence"},
    "qqp": {"text": "question1", "text_pair": "question2"},
    "rte": {"text": "sentence1", "text_pair": "sentence2"},
    "sst2": {"text": "sentence"},
}
"""Columns of the tasks of GLUE that have labels."""
PAPER_TASKS = ("mnli", "mrpc", "qnli", "qqp", "rte", "sst2")
EXAMPLES = (128, 2048)
AVERAGE, FISHER, PUBLISHED, OURS = "average", "full-scale Fisher", "published rule", "mask_fisher"
METHODS: Final[Mapping[str, Fields]] = {
    FISHER: {"name": "fisher", "normalize": False, "estimator": "empirical"},
    PUBLISHED: {"name": "mask_fisher", "preset": "paper"},
    OURS: {"name": "mask_fisher"},
}
"""Methods that measure. The first two are as they were published: neither evens out how confident models are."""
SPEEDUP = 57.4
"""Least of the paper's ratios of the times of full-scale Fisher information and of mask nodes."""


@dataclass(frozen=True)
class Expert:
    task: str
    checkpoint: str
    rows: Fields
    """Data set to measure."""
    held_out: Fields
    """Data set to evaluate."""

    def measured(self, limit: int) -> dict[str, Any]:
        return {"name": self.task, "checkpoint": self.checkpoint, "dataset": {**self.rows, "limit": limit}}

    def merged(self, limit: int) -> dict[str, Any]:
        return {**self.measured(limit), "evaluation": dict(self.held_out)}


def of_glue(model: str, tasks: Sequence[str], limit: int) -> list[Expert]:
    """Return the experts of a model whose reference has `{task}` in it."""
    found = []
    for task in tasks:
        columns = {key: value for key, value in GLUE[task].items() if key not in ("metric", "validation")}
        rows = {"source": "hub:nyu-mll/glue", "config": task, "label": "label", **columns}
        held_out = {**rows, "split": GLUE[task].get("validation", "validation"), "limit": limit}
        if "metric" in GLUE[task]:
            held_out["metric"] = GLUE[task]["metric"]
        found.append(Expert(task, model.replace("{task}", task), {**rows, "split": "train"}, held_out))
    return found


def of_folder(out: Path, data: Path, tasks: Sequence[str]) -> list[Expert]:
    """Train the experts of a folder's tasks unless they are there."""
    made = prepare(out, data, on_expert=lambda name, _: console.print(f"{name} is trained"))
    found = []
    for task in tasks or sorted(path.parent.name for path in data.rglob("validation.jsonl")):
        if task not in made:
            raise SystemExit(f"there is no task {task} in {data}; there are {', '.join(made)}")
        first = json.loads((out / "tasks" / task / "train.jsonl").open(encoding="utf-8").readline())
        columns = {"label": "label", **({"text_pair": "text_pair"} if first.get("text_pair") else {})}
        rows, held_out = ({"source": f"local:tasks/{task}/{part}.jsonl", **columns} for part in ("train", "validation"))
        found.append(Expert(task, f"local:experts/{task}", rows, held_out))
    return found


@dataclass(frozen=True)
class Protocol:
    """Runs jobs by the service, each once: their results are files in a folder."""

    client: Client
    results: Path

    def score(self, model: str, expert: Expert, method: str, examples: int) -> float:
        """Return the seconds of measuring an expert."""
        recipe = {"method": {**METHODS[method], "examples": examples}, "models": [expert.measured(examples)]}
        key = f"{model}_{expert.task}_{method}_{examples}".replace(" ", "-")
        return ScoreResult.model_validate(self._result(key, recipe, scores=True)).timings.score_seconds

    def merge(self, model: str, pair: Sequence[Expert], method: str, examples: int) -> MergeResult:
        """Merge two experts and evaluate the merge on both tasks."""
        recipe = {
            "method": {**METHODS[method], "examples": examples},
            "models": [expert.merged(examples) for expert in pair],
            "output": {"align_heads": False},
        }
        key = f"{model}_{'+'.join(expert.task for expert in pair)}_{method}_{examples}".replace(" ", "-")
        return MergeResult.model_validate(self._result(key, recipe, scores=False))

    def _result(self, key: str, recipe: dict[str, Any], *, scores: bool) -> Any:
        path = self.results / f"{key}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["recipe"] == recipe:
                return found["result"]
        send = self.client.submit_scores if scores else self.client.submit
        job = self.client.wait(send(recipe).id)
        if job.result is None:
            raise SystemExit(f"{key}: {job.error.message if job.error else job.status}")
        result = job.result.model_dump(mode="json")
        self.client.delete(job.id)  # a model of a hundred pairs would fill the disk
        path.write_text(json.dumps({"recipe": recipe, "result": result}, indent=1) + "\n", encoding="utf-8")
        console.print(f"{key}: done")
        return result


@dataclass(frozen=True)
class Found:
    """Metrics of a model's pairs in percent, and seconds of measuring an expert, by method and rows."""

    pairs: Mapping[str, Mapping[tuple[str, int], float]]
    seconds: Mapping[tuple[str, int], float]

    def mean(self, column: tuple[str, int]) -> float:
        return mean(values[column] for values in self.pairs.values())


def run(protocol: Protocol, model: str, experts: Sequence[Expert], examples: Sequence[int]) -> Found:
    """Measure every expert, and merge and evaluate every pair."""
    columns = [(method, count) for method in METHODS for count in examples]
    seconds = {
        (method, count): mean(protocol.score(model, expert, method, count) for expert in experts)
        for method, count in columns
    }
    pairs = {}
    for pair in combinations(experts, 2):
        values: dict[tuple[str, int], float] = {}
        for method, count in columns:
            metrics = (protocol.merge(model, pair, method, count).metrics or {}).values()
            values[method, count] = 100 * mean(metric.merged for metric in metrics)
            values[AVERAGE, 0] = 100 * mean(metric.average for metric in metrics)
        pairs[" + ".join(expert.task for expert in pair)] = values
    return Found(pairs, seconds)


def tables(model: str, found: Found) -> Iterator[Table]:
    """Yield the metrics of each pair, and the times, in the paper's form."""
    columns = [(AVERAGE, 0), *found.seconds]
    quality = Table(title=f"{model}: mean metric of both tasks, percent", title_justify="left")
    quality.add_column("pair")
    for method, count in columns:
        quality.add_column(f"{method}, {count}" if count else method, justify="right")
    for pair, values in found.pairs.items():
        quality.add_row(pair, *(f"{values[column]:.1f}" for column in columns))
    quality.add_row("mean", *(f"{found.mean(column):.1f}" for column in columns))
    yield quality
    times = Table(title=f"{model}: seconds of measuring an expert", title_justify="left")
    for name in ("method, rows", "seconds", "full-scale Fisher takes"):
        times.add_column(name, justify="left" if "method" in name else "right")
    for (method, count), seconds in found.seconds.items():
        times.add_row(f"{method}, {count}", f"{seconds:.2f}", f"{found.seconds[FISHER, count] / seconds:.1f} times")
    yield times


def rows(model: str, found: Found) -> Iterator[dict[str, Any]]:
    """Yield the paper's claims: nearer to the experts than the average and full-scale Fisher, in much less time."""
    for count in dict.fromkeys(count for _, count in found.seconds):
        ours = found.mean((OURS, count))
        for reference in ((AVERAGE, 0), (FISHER, count), (PUBLISHED, count)):
            theirs = found.mean(reference)
            yield {
                "what": f"{model}, {count} rows: mean metric against {reference[0]}", "ours": ours, "reference": theirs,
                "ratio": ours / theirs, "target": ">= 1", "met": ours >= theirs,
            }  # fmt: skip
        seconds, theirs = found.seconds[OURS, count], found.seconds[FISHER, count]
        yield {
            "what": f"{model}, {count} rows: seconds of measuring against full-scale Fisher", "ours": seconds,
            "reference": theirs, "ratio": seconds / theirs, "target": f"<= 1/{SPEEDUP:g}",
            "met": seconds * SPEEDUP <= theirs,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The protocol of arXiv 2403.09891, run through the service.")
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--models", nargs="+", metavar="NAME=REFERENCE", help="experts by model, with {task} in them")
    named.add_argument("--data", type=Path, help="folder of tasks on which experts are trained")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"(those of DATA, or {' '.join(PAPER_TASKS)})")
    parser.add_argument("--examples", nargs="+", type=int, default=EXAMPLES, help="rows to measure (128 2048)")
    parser.add_argument("--validation-rows", type=int, default=2000, help="of GLUE, held out, at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".bench/paper"), help="what is kept (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    options = parser.parse_args()
    if unknown := {*(options.tasks or ())} - {*GLUE} and options.models:
        parser.error(f"GLUE has no task {', '.join(sorted(unknown))}; known are {', '.join(GLUE)}")
    out = options.out.resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    if options.data:
        models = {"MiniLM": partial(of_folder, out, options.data, options.tasks or ())}
    else:
        models = {}
        for given in options.models:
            name, _, reference = given.partition("=")
            if "{task}" not in reference:
                parser.error(f"'{given}' is not NAME=REFERENCE with {{task}} in it")
            models[name] = partial(of_glue, reference, options.tasks or PAPER_TASKS, options.validation_rows)
    found: list[dict[str, Any]] = []
    for name, experts in models.items():
        made = experts()
        roots = f"{out}:{Path.cwd()}"
        with (
            started("serve", "", "/readyz", data_dir=str(out / "data"), local_roots=roots, workers="1") as service,
            Client(f"http://127.0.0.1:{service.port}") as client,
        ):
            results = run(Protocol(client, out / "results"), name, made, options.examples)
        for table in tables(name, results):
            console.print(table)
        found += rows(name, results)
    shown(options.json, found)


if __name__ == "__main__":
    main()
