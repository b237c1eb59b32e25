"""Two models of one ancestor with rows beside them, and the comparisons that tests of every kind of head make."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.score_names import assert_same_in_norm, by_name
from tests.tiny import LAYERS, dataset_spec, merge_spec, model_spec, read_model, silent, write_lines
from tests.tiny_families import TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import EvaluationSpec, ModelSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import NODE_KINDS, ScoreName
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.catalog.tasks import LabelMap
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.inputs.tables import read_parquet
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.scorer import score

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score in norm, float32 against float64


@dataclass(frozen=True)
class Siblings:
    """Two models of one ancestor, `one` and `two`, with rows beside them."""

    tiny: TinyFamily
    root: Path
    auto_class: Any
    """The class of transformers that loads them."""
    spec_of: Callable[[Path], DatasetSpec] = dataset_spec
    """Names the columns of a file of rows."""

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    def file(self, name: str = "one") -> Path:
        return self.root / f"{name}.jsonl"

    def spec(self, name: str = "one") -> DatasetSpec:
        return self.spec_of(self.file(name))

    def rows(self, name: str = "one") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file(name).read_text().splitlines()]

    def loaded(self, name: str = "one") -> LoadedModel:
        return load(inspect_checkpoint(self.root / name, name), CPU)

    def exact(self, folder: Path | None = None) -> Any:
        """The model in float64, as transformers loads it."""
        return self.auto_class.from_pretrained(folder or self.models["one"], dtype=torch.float64).eval()

    def evaluated(self, metric: str, rows: str = "-held-out") -> list[ModelSpec]:
        """Both models, measured on their rows and evaluated on those whose file's name ends with `rows`."""
        found = []
        for name, folder in self.models.items():
            evaluation = EvaluationSpec(**self.spec(f"{name}{rows}").model_dump(), metric=metric)
            found.append(model_spec(folder, None, dataset=self.spec(name), evaluation=evaluation))
        return found

    def versions(self, name: str, folder: Path) -> dict[str, Path]:
        """The folders of a model's expert and of its merge."""
        return {"expert": self.models[name], "merged": folder}


def write_objects(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    return write_lines(file, [json.dumps(row) for row in rows])


def examples_of(loaded: LoadedModel, spec: DatasetSpec, *, labelled: bool = True) -> list[Example]:
    """All rows of a file, in their order."""
    reader = loaded.task.rows
    rows = read_parquet(spec, reader) if str(spec.path).endswith(".parquet") else RowFile(spec, reader)
    labels = LabelMap(loaded.task) if labelled else None
    read = sample(rows, spec, None, shuffle=False)
    return tokenize(read, spec, loaded.tokenizer, loaded.max_length, labels, reading=loaded.kind).examples


def scores_by_masks(
    tiny: TinyFamily, masks: Sequence[Tensor], rows: Iterable[Iterable[tuple[float, Tensor]]]
) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there, from log-likelihoods of labels with their weights, row by row."""
    total, count = [torch.zeros_like(mask) for mask in masks], 0
    for row in rows:
        count += 1
        for weight, likelihood in row:
            gradients = torch.autograd.grad(likelihood, masks, retain_graph=True)
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += weight * gradient**2
    return by_name(tiny, [of_kind / count for of_kind in total])


def assert_batches_do_not_matter(
    loaded: LoadedModel, examples: Sequence[Example], estimator: Estimator, within: float = 1e-5
) -> None:
    """Scores of all rows in one batch are those of each row alone, in the other order."""
    batches = ([[*examples]], [[one] for one in reversed(examples)])
    together, apart = (score(loaded, [*examples], estimator, "float32", "rows", silent, of).scores() for of in batches)
    assert_same_in_norm(together, apart, within)


def assert_squares(found: Mapping[ScoreName, Tensor], gradients: Sequence[Tensor]) -> None:
    """Scores of the published rule are the squared derivatives of one loss, (layers, nodes) each."""
    for kind, of in zip(("heads", "neurons"), gradients, strict=True):
        for layer in range(LAYERS):
            exact = of[layer] ** 2
            torch.testing.assert_close(found[ScoreName(layer, NODE_KINDS[kind])], exact, rtol=1e-3, atol=1e-12)


def assert_grams(
    found: Mapping[str, Tensor], model: Any, inputs: Sequence[LinearInput], run: Callable[[], object]
) -> None:
    """Gram matrices are those of what the modules' inputs are while `run` runs the model, row by row."""
    seen: dict[str, list[Tensor]] = {one.name: [] for one in inputs}
    for one in inputs:
        see = seen[one.name].append
        model.get_submodule(one.module).register_forward_pre_hook(lambda _, args, see=see: see(args[0].flatten(0, -2)))
    with torch.no_grad():
        run()
    assert found.keys() == seen.keys()
    for name, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def assert_same_model(folder: Path, expected: Path) -> None:
    """The files' tensors are the same, bit by bit."""
    found, own = read_model(folder), read_model(expected)
    assert found.keys() == own.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in own.items())


def merged_with_itself(engine: Engine, folder: Path, case: Siblings, method: str = "mask_fisher") -> Path:
    """Merge the first model with itself, as `first` and `second`, and return the folder of the artifact."""
    specs = [model_spec(case.models["one"], None, name=name, dataset=case.spec()) for name in ("first", "second")]
    engine.merge(merge_spec(folder, specs, {"name": method}), silent)
    return folder


def searched(engine: Engine, folder: Path, models: Sequence[ModelSpec]) -> MergeResult:
    """Let `auto` choose between two methods."""
    spec = merge_spec(folder, [*models], evaluate=True)
    raw = {**spec.model_dump(), "method": {"name": "auto", "candidates": ["average", "mask_fisher"], "trials": 3}}
    return engine.merge(type(spec).model_validate(raw), silent)
