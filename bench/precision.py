"""Is bfloat16 good enough? Scores and merges by bfloat16 against float32, family by family.

    python bench/precision.py [--out OUT] [--json FILE] [--family NAME]... [--rows N]

Writes the packaged pre-trained BERT as a checkpoint of every family, fine-tunes two experts of each on the packaged
tasks (five labels, and two), scores both in float32 and in bfloat16, and merges them by mask_fisher with either. Every
merge is evaluated in float32.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers.utils import logging

from bench.experts import Task, make_tasks
from bench.families import ENCODERS, fine_tune, write_ancestor, write_rows
from bench.table import console, shown
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import MergeSpec, StoreSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import NODE_KINDS, ScoreName
from worker.engine.catalog.methods import MaskFisherParameters
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.catalog.tasks import LabelMap
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import bootstrap
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.methods.mask_fisher import node_weights
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime.device import Precision, best_device
from worker.engine.tasks.metrics import Array

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HEADS = ("kept", "aligned")
TRAIN_ROWS = 2400
VALIDATION_ROWS = 800
EPOCHS = 2
MAX_TOKENS = 128
LEAST_SPEARMAN = 0.999
MOST_DIFFERENCE = 1e-4  # of a hidden state from BERT's: rounding
SEED = 0
METHOD = MaskFisherParameters()
Scores = dict[ScoreName, Tensor]


@dataclass
class Expert:
    """One task's expert in one family."""

    task: str
    folder: Path
    model: LoadedModel
    held_out: list[Example]
    accuracy: float

    @property
    def labels(self) -> Array:
        return labels_of(self.held_out)


@dataclass(frozen=True)
class Merge:
    """The experts' scores and the merge's predictions for their held-out rows, both by task."""

    scores: dict[str, Scores]
    predicted: dict[str, Array]


@dataclass(frozen=True)
class Agreement:
    """Agreement of scores by bfloat16 with scores by float32: the lowest rank correlation over the experts."""

    neurons: float
    heads: float
    layer: float
    """Neurons, within one layer, the lowest of all layers. A layer's few heads are too few: two neighbours that swap
    their places among twelve cost .007."""
    weights: float
    """The largest change of a node's merge weight."""


@dataclass(frozen=True)
class Comparison:
    """One task's accuracy in the merges of one family, and the paired difference."""

    float32: float
    bfloat16: float
    interval: tuple[float, float]
    changed: int
    """Predictions that are not the same."""

    @property
    def is_noise(self) -> bool:
        return self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Family:
    """What was found of one family."""

    experts: list[Expert]
    agreement: Agreement
    merges: dict[tuple[str, str], Comparison]
    """Comparisons by heads and task."""


class Bench:
    def __init__(self, out: Path, rows: int) -> None:
        self.device = best_device()
        self.out = out
        self.rows = rows
        self.tasks = make_tasks(None, TRAIN_ROWS, VALIDATION_ROWS, SEED)
        for name, task in self.tasks.items():
            (out / "tasks" / name).mkdir(parents=True, exist_ok=True)
            write_rows(self.rows_file(name, "train"), task.train)
            write_rows(self.rows_file(name, "validation"), task.validation)

    def rows_file(self, task: str, part: str) -> Path:
        return self.out / "tasks" / task / f"{part}.jsonl"

    def dataset(self, task: str, part: str) -> dict[str, Any]:
        path = self.rows_file(task, part)
        return {"source": path.name, "path": path, "label": "label", "max_length": MAX_TOKENS}

    def run(self, family: str) -> Family:
        ancestor = self.out / "ancestors" / family
        if not ancestor.exists():
            with self.whole(ancestor) as build:
                difference = write_ancestor(family, build)
                if difference > MOST_DIFFERENCE:
                    raise RuntimeError(f"{family} is not the packaged BERT: hidden states differ by {difference:g}")
        experts = [self.expert(family, ancestor, name, task) for name, task in self.tasks.items()]
        merges = {
            heads: {precision: self.merge(experts, precision, heads) for precision in PRECISIONS} for heads in HEADS
        }
        scores = [merges["kept"][precision].scores for precision in PRECISIONS]
        compared = {
            (heads, expert.task): compared_on(
                expert, *(of[precision].predicted[expert.task] for precision in PRECISIONS)
            )
            for heads, of in merges.items()
            for expert in experts
        }
        return Family(experts, agreement(*scores), compared)

    @contextmanager
    def whole(self, folder: Path) -> Iterator[Path]:
        """A place to write the folder to, which takes its name once it is finished."""
        with TemporaryDirectory(dir=self.out) as build:
            yield Path(build) / folder.name
            folder.parent.mkdir(parents=True, exist_ok=True)
            (Path(build) / folder.name).rename(folder)

    def expert(self, family: str, ancestor: Path, name: str, task: Task) -> Expert:
        folder = self.out / "experts" / family / name
        if not folder.exists():
            with self.whole(folder) as build:
                fine_tune(ancestor, task.labels, task.train, build, EPOCHS, SEED)
        model = load(inspect_checkpoint(folder, name), self.device)
        spec = DatasetSpec(**self.dataset(name, "validation"))
        found = sample(RowFile(spec), spec, None)
        held_out = tokenize(found, spec, model.tokenizer, model.max_length, LabelMap(model.task)).examples
        right = predict(model, held_out, "float32", lambda _: None) == labels_of(held_out)
        return Expert(name, folder, model, held_out, float(right.mean()))

    def merge(self, experts: list[Expert], precision: Precision, heads: str) -> Merge:
        """Scored, and its heads aligned, in `precision`; evaluated in float32."""
        models = [
            {
                "name": expert.task,
                "source": expert.task,
                "path": expert.folder,
                "weight": 1.0,
                "dataset": self.dataset(expert.task, "train"),
            }
            for expert in experts
        ]
        with TemporaryDirectory(dir=self.out) as folder:
            spec = MergeSpec.model_validate(
                {
                    "name": "merge",
                    "models": models,
                    "method": METHOD.model_copy(update={"examples": self.rows, "precision": precision}),
                    "output": {"align_heads": heads == "aligned"},
                    "evaluate": False,
                    "recipe": {},
                    "folder": Path(folder),
                    "store": StoreSpec(folder=self.out / "statistics", max_bytes=10**10),
                }
            )
            Engine(self.device).merge(spec, lambda *_: None)
            scores = {expert.task: read_scores(Path(folder), expert.task) for expert in experts}
            predicted = {}
            for expert in experts:
                merged = load(inspect_checkpoint(Path(folder) / "models" / expert.task, expert.task), self.device)
                predicted[expert.task] = predict(merged, expert.held_out, "float32", lambda _: None)
            return Merge(scores, predicted)


def read_scores(artifact: Path, model: str) -> Scores:
    """Without their standard errors."""
    found = load_file(artifact / "scores" / f"{model}.safetensors")
    layers = range(sum(name.endswith(".heads") for name in found))
    names = [ScoreName(layer, NODE_KINDS[kind]) for layer in layers for kind in ("heads", "neurons")]
    return {name: found[name] for name in names}


def labels_of(examples: list[Example]) -> Array:
    return np.array([example.label for example in examples], dtype=np.float64)


def rank_correlation(one: Scores, other: Scores, sites: list[ScoreName]) -> float:
    """Spearman's over the nodes of all sites together."""
    return float(spearmanr(*(torch.cat([scores[site] for site in sites]).numpy() for scores in (one, other)))[0])


def agreement(float32: Mapping[str, Scores], bfloat16: Mapping[str, Scores]) -> Agreement:
    """The lowest over the experts; scores by task."""
    found: dict[str, list[float]] = {"neurons": [], "heads": [], "layer": []}
    for task, exact in float32.items():
        for kind in ("heads", "neurons"):
            sites = [site for site in exact if site.kind.name == kind]
            found[kind].append(rank_correlation(exact, bfloat16[task], sites))
            if kind == "neurons":
                found["layer"].append(min(rank_correlation(exact, bfloat16[task], [site]) for site in sites))
    weights = [
        node_weights([MeasuredModel(1.0, scores) for scores in of.values()], METHOD) for of in (float32, bfloat16)
    ]
    sites, place = list(next(iter(float32.values()))), TensorPlace("", 0.0)
    changes = [float((weights[0](site, place) - weights[1](site, place)).abs().max()) for site in sites]
    return Agreement(**{name: min(values) for name, values in found.items()}, weights=max(changes))


def compared_on(expert: Expert, float32: Array, bfloat16: Array) -> Comparison:
    """Compare two precisions by their predictions for the expert's held-out rows."""
    draws = bootstrap("accuracy", expert.model.task, expert.labels, [float32, bfloat16], SEED)
    low, high = np.quantile(draws[1] - draws[0], [0.025, 0.975])
    accuracies = [float((one == expert.labels).mean()) for one in (float32, bfloat16)]
    return Comparison(accuracies[0], accuracies[1], (float(low), float(high)), int((float32 != bfloat16).sum()))


def show(found: Mapping[str, Family]) -> None:
    table = Table(title="Scores by bfloat16 against scores by float32, the lower of both experts", title_justify="left")
    for column in ("family", "accuracy", "neurons", "neurons, lowest layer", "heads", "merge weight, largest change"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for name, family in found.items():
        of = family.agreement
        accuracy = " ".join(f"{expert.accuracy:.3f}" for expert in family.experts)
        table.add_row(name, accuracy, f"{of.neurons:.5f}", f"{of.layer:.5f}", f"{of.heads:.5f}", f"{of.weights:.4f}")
    console.print(table)
    table = Table(title="Accuracy of merges by mask_fisher, all evaluated in float32", title_justify="left")
    for column in ("family", "heads", "task", "float32", "bfloat16", "difference", "predictions changed"):
        table.add_column(column, justify="left" if column in ("family", "heads", "task") else "right")
    for name, family in found.items():
        for (heads, task), merge in family.merges.items():
            low, high = merge.interval
            difference = f"{merge.bfloat16 - merge.float32:+.4f} ({low:+.4f} to {high:+.4f})"
            accuracies = (f"{merge.float32:.4f}", f"{merge.bfloat16:.4f}")
            table.add_row(name, heads, task, *accuracies, difference, str(merge.changed))
    console.print(table)


def rows_of(found: Mapping[str, Family]) -> list[dict[str, Any]]:
    """What must be reached, as rows of the bench's JSON."""
    rows = []

    def row(what: str, ours: float, reference: float, target: str, met: bool) -> None:
        rows.append(
            {
                "what": what,
                "ours": ours,
                "reference": reference,
                "ratio": ours / reference,
                "target": target,
                "met": met,
            }
        )

    for name, family in found.items():
        of = family.agreement
        for what, value in (("neurons", of.neurons), ("neurons, lowest layer", of.layer), ("heads", of.heads)):
            row(f"{name}: Spearman of scores by bfloat16, {what}", value, LEAST_SPEARMAN, f"at least {LEAST_SPEARMAN}",
                value >= LEAST_SPEARMAN)  # fmt: skip
        for (heads, task), merge in family.merges.items():
            row(f"{name}: accuracy on {task} merged by bfloat16, heads {heads}", merge.bfloat16, merge.float32,
                "difference within its interval", merge.is_noise)  # fmt: skip
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores and merges by bfloat16 against float32, family by family.")
    parser.add_argument("--out", type=Path, default=Path(".bench/precision"), help="what is made (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the rows of targets")
    parser.add_argument("--family", action="append", choices=ENCODERS, help="these alone; all by default")
    parser.add_argument("--rows", type=int, default=512, help="of each task, to score on (%(default)s)")
    options = parser.parse_args()
    logging.set_verbosity_error()  # else it tells of each training that the new head is not pre-trained
    logging.disable_progress_bar()
    bench = Bench(options.out, options.rows)
    found = {name: bench.run(name) for name in options.family or ENCODERS}
    show(found)
    shown(options.json, rows_of(found))


if __name__ == "__main__":
    main()
