"""Choices of which one is right: scores, statistics, merges and metrics against independent computations."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as CLASSES

from tests.score_names import assert_same_in_norm, by_name
from tests.tiny import (
    LAYERS,
    dataset_spec,
    insert_masks,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    write_lines,
)
from tests.tiny_families import OF_EACH_FORM, TINY_FAMILIES, WORDS, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import NODE_KINDS, ScoreName
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import LabelMap
from worker.engine.evaluation.metrics import bootstrap
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.gram import grams
from worker.engine.scoring.scorer import paper_scores, score
from worker.engine.tasks.drawing import uniform

WITH_HEAD = [name for name in OF_EACH_FORM if TINY_FAMILIES[name].model_type in CLASSES]
"""Families of each form of which the library has such a class."""
ROWS = 20
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of a score in norm, float32 against float64
Row = dict[str, Any]


def rows_of(seed: int, count: int = ROWS) -> list[Row]:
    """Of two to four choices each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(rng.randint(2, 4))]
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        rows.append({"text": text, "choices": choices, "label": rng.randrange(len(choices))})
    return rows


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    return write_lines(file, [json.dumps(row) for row in rows])


@dataclass(frozen=True)
class Case:
    """Two models of one ancestor, `one` and `two`, with rows beside them."""

    tiny: TinyFamily
    root: Path

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.root / name for name in ("one", "two")}

    def rows(self, name: str = "one") -> list[Row]:
        return [json.loads(line) for line in (self.root / f"{name}.jsonl").read_text().splitlines()]

    def spec(self, name: str = "one") -> DatasetSpec:
        return dataset_spec(self.root / f"{name}.jsonl")

    def loaded(self, name: str = "one") -> LoadedModel:
        return load(inspect_checkpoint(self.root / name, name), CPU)


def made(root: Path, tiny: TinyFamily) -> Case:
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, task="MultipleChoice")
        write(root / f"{name}.jsonl", rows_of(seed))
        write(root / f"{name}-held-out.jsonl", rows_of(10 + seed))
    return Case(tiny, root)


@pytest.fixture(scope="module", params=WITH_HEAD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(tmp_path_factory.mktemp(request.param), TINY_FAMILIES[request.param])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(tmp_path_factory.mktemp("bert-alone"), TINY_FAMILIES["bert"])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def examples_of(loaded: LoadedModel, spec: DatasetSpec) -> list[Example]:
    read = sample(RowFile(spec, loaded.task.rows), spec, None, shuffle=False)
    labels = LabelMap(loaded.task)
    return tokenize(read, spec, loaded.tokenizer, loaded.max_length, labels, reading=loaded.kind).examples


def logits_of(model: Any, tokenizer: Any, row: Row) -> Tensor:
    """Of a row's choices, each in a pass of its own, without padding."""
    found = []
    for choice in row["choices"]:
        encoded = tokenizer(row["text"], choice, return_tensors="pt")
        taken = {n: encoded[n][None] for n in ("input_ids", "token_type_ids", "attention_mask") if n in encoded}
        if getattr(model.config, "type_vocab_size", 0) < 2:
            taken.pop("token_type_ids", None)
        found.append(model(**taken).logits[0, 0])
    return torch.stack(found)


def scores_one_by_one(case: Case, estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row and a choice at a time, float64."""
    model = AutoModelForMultipleChoice.from_pretrained(case.models["one"], dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.models["one"])
    masks = insert_masks(model, case.tiny)
    total = [torch.zeros_like(mask) for mask in masks]
    rows = case.rows()
    for index, row in enumerate(rows):
        logp = logits_of(model, tokenizer, row).log_softmax(0)
        p = logp.detach().exp()
        if estimator.name == "expected":
            weighted = [(float(p[choice]), choice) for choice in range(len(p))]
        elif estimator.name == "sampled":
            weighted = [(1.0, int((p.cumsum(0)[:-1] <= uniform(estimator.seed, index)).sum()))]
        else:
            weighted = [(1.0, row["label"])]
        for weight, choice in weighted:
            found = torch.autograd.grad(logp[choice], masks, retain_graph=True)
            for sum_, gradient in zip(total, found, strict=True):
                sum_ += weight * gradient**2 / len(rows)
    return by_name(case.tiny, total)


@pytest.mark.parametrize("name", ["expected", "sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Case, name: Any) -> None:
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    found = score(loaded, examples_of(loaded, case.spec()), estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, scores_one_by_one(case, estimator), TOLERANCE)


@pytest.mark.parametrize("name", ["expected", "sampled"])
def test_scores_do_not_depend_on_batch_order_and_padding(case: Case, name: Any) -> None:
    loaded, estimator = case.loaded(), Estimator(name, 3)
    examples = examples_of(loaded, case.spec())
    together = score(loaded, examples, estimator, "float32", "rows", silent, [examples]).scores()
    alone = [[one] for one in reversed(examples)]
    apart = score(loaded, examples, estimator, "float32", "rows", silent, alone).scores()
    assert_same_in_norm(together, apart, 1e-5)


def test_gram_matrices_are_those_of_every_choice(case: Case) -> None:
    loaded = case.loaded()
    inputs = plan_merge([loaded.info]).linear_inputs
    found = grams(loaded, inputs, examples_of(loaded, case.spec()), "float32", "rows", silent)
    model = AutoModelForMultipleChoice.from_pretrained(case.models["one"], dtype=torch.float64).eval()
    seen: dict[str, list[Tensor]] = {one.name: [] for one in inputs}
    for one in inputs:
        see = seen[one.name].append
        model.get_submodule(one.module).register_forward_pre_hook(
            lambda _, args, see=see: see(args[0].reshape(-1, args[0].shape[-1]))
        )
    tokenizer = AutoTokenizer.from_pretrained(case.models["one"])
    with torch.no_grad():
        for row in case.rows():
            logits_of(model, tokenizer, row)
    assert found.keys() == seen.keys()
    for name, parts in seen.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mask_fisher", "fisher", "aligned_regmean"])
def test_a_model_merged_with_itself_is_itself(case: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    if case.tiny.shares_layers and method == "aligned_regmean":
        pytest.skip("layers that share their weights are not refitted")
    specs = [model_spec(case.models["one"], None, name=name, dataset=case.spec()) for name in ("first", "second")]
    engine.merge(merge_spec(tmp_path / "out", specs, {"name": method}), silent)
    own = read_model(case.models["one"])
    for name in ("first", "second"):
        merged = read_model(tmp_path / "out" / "models" / name)
        assert own.keys() == merged.keys()
        assert all(torch.equal(tensor, merged[key]) for key, tensor in own.items())


@pytest.mark.parametrize("method", ["mask_fisher", "aligned_regmean"])
def test_siblings_keep_their_heads_and_are_evaluated(case: Case, engine: Engine, tmp_path: Path, method: str) -> None:
    """Accuracy of the published models, choice by choice."""
    if case.tiny.shares_layers and method == "aligned_regmean":
        pytest.skip("layers that share their weights are not refitted")
    specs = []
    for name, folder in case.models.items():
        evaluation = EvaluationSpec(**case.spec(f"{name}-held-out").model_dump(), metric="accuracy")
        specs.append(model_spec(folder, None, dataset=case.spec(name), evaluation=evaluation))
    spec = merge_spec(tmp_path / "out", specs, {"name": method}, evaluate=True, align_heads=True)
    result = engine.merge(spec, silent)
    assert result.metrics is not None
    assert [model.aligned_examples for model in result.models] == [ROWS, ROWS]
    for name, folder in case.models.items():
        rows = case.rows(f"{name}-held-out")
        for version, path in {"expert": folder, "merged": tmp_path / "out" / "models" / name}.items():
            model = AutoModelForMultipleChoice.from_pretrained(path, dtype=torch.float64).eval()
            tokenizer = AutoTokenizer.from_pretrained(path)
            with torch.no_grad():
                hits = [int(logits_of(model, tokenizer, row).argmax()) == row["label"] for row in rows]
            assert getattr(result.metrics[name], version) == pytest.approx(sum(hits) / ROWS, abs=1e-9)


def test_auto_searches_on_choices(bert: Case, engine: Engine, tmp_path: Path) -> None:
    specs = []
    for name, folder in bert.models.items():
        evaluation = EvaluationSpec(**bert.spec(f"{name}-held-out").model_dump(), metric="accuracy")
        specs.append(model_spec(folder, None, dataset=bert.spec(name), evaluation=evaluation))
    spec = merge_spec(tmp_path / "out", specs, evaluate=True)
    raw = {**spec.model_dump(), "method": {"name": "auto", "candidates": ["average", "mask_fisher"], "trials": 3}}
    result = engine.merge(type(spec).model_validate(raw), silent)
    assert result.metrics is not None
    assert set(result.metrics) == set(bert.models)


def test_the_published_rule_takes_the_models_own_loss(bert: Case) -> None:
    loaded = bert.loaded()
    model = AutoModelForMultipleChoice.from_pretrained(bert.models["one"], dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert.models["one"])
    masks = insert_masks(model, bert.tiny)
    losses = []
    for row in bert.rows():
        encoded = tokenizer([row["text"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        inputs = {name: values[None] for name, values in encoded.items()}
        losses.append(model(**inputs, labels=torch.tensor([row["label"]])).loss)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), masks)
    found = paper_scores(loaded, examples_of(loaded, bert.spec()), "rows", silent)
    for kind, of in zip(("heads", "neurons"), gradients, strict=True):
        for layer in range(LAYERS):
            exact = of[layer] ** 2
            torch.testing.assert_close(found[ScoreName(layer, NODE_KINDS[kind])], exact, rtol=1e-3, atol=1e-12)


def test_intervals_are_those_of_accuracy_on_the_same_resamples(bert: Case) -> None:
    rng = np.random.default_rng(1)
    labels, predicted = (rng.integers(0, 4, 40).astype(float) for _ in range(2))
    found = bootstrap("accuracy", bert.loaded().task, labels, [predicted], 7)
    again = np.random.default_rng(7)
    for resample in range(20):
        rows = again.integers(0, 40, 40)
        assert found[0, resample] == pytest.approx((labels[rows] == predicted[rows]).mean(), abs=1e-12)


def test_choices_may_begin_with_the_same_text(bert: Case, tmp_path: Path) -> None:
    loaded = bert.loaded()
    apart = {"text": "one", "start": "two", "choices": ["three four", "five"], "label": "five"}
    whole = {"text": "one", "choices": ["two three four", "two five"], "label": 1}
    found = examples_of(loaded, dataset_spec(write(tmp_path / "apart.jsonl", [apart]), text_pair="start"))
    expected = examples_of(loaded, dataset_spec(write(tmp_path / "whole.jsonl", [whole])))
    assert [(e.inputs, e.label) for e in found] == [(e.inputs, e.label) for e in expected]


GOOD = {"text": "one", "choices": ["two", "three"], "label": 1}
REFUSED: dict[str, tuple[Row, list[str]]] = {
    "no choices": ({"text": "one", "label": 1}, ["no column 'choices'"]),
    "one choice": ({**GOOD, "choices": ["two"]}, ["column 'choices' is no list of two or more texts"]),
    "an empty choice": ({**GOOD, "choices": ["two", ""]}, ["column 'choices' has an empty text"]),
    "a choice that is none": ({**GOOD, "choices": ["two", None]}, ["column 'choices' is not text"]),
    "a label out of range": ({**GOOD, "label": 2}, ["the choices are 0 to 1"]),
    "a label of no choice": ({**GOOD, "label": "four"}, ["neither the place of a choice"]),
    "no label": ({**GOOD, "label": None}, ["neither the place of a choice"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_are_none_are_refused_by_line(bert: Case, tmp_path: Path, fault: str) -> None:
    row, words = REFUSED[fault]
    loaded, spec = bert.loaded(), dataset_spec(write(tmp_path / "rows.jsonl", [GOOD, row]))
    with pytest.raises(InvalidDataset) as caught:
        examples_of(loaded, spec)
    assert all(word in caught.value.message for word in ["line 2", *words]), caught.value.message


def test_the_default_is_the_expectation(bert: Case) -> None:
    assert estimator_for("auto", bert.loaded().task, 0) == Estimator("expected", 0)
