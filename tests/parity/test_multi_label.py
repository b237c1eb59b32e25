"""Heads of which several labels may apply: scores against every set of labels, labels as data has them, and merges."""

import json
import random
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table
from sklearn import metrics as sk
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.score_names import named
from tests.tiny import (
    LAYERS,
    dataset_spec,
    float64_model,
    insert_masks,
    merge_spec,
    model_spec,
    silent,
    tiny_checkpoint,
    tiny_texts,
    write_lines,
)
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks import LabelMap, MultiLabel
from worker.engine.evaluation.metrics import bootstrap, metric_for
from worker.engine.inputs.examples import Example, tokenize
from worker.engine.inputs.tables import read_parquet
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.scorer import paper_scores, score

NAMES = ("insult", "threat", "praise")
PROBLEM = "multi_label_classification"
TASK = MultiLabel(3, {name: index for index, name in enumerate(NAMES)})
ROWS = 30


def write(path: Path, seed: int, count: int = ROWS) -> Path:
    rng = random.Random(seed)
    rows = [{"text": t, "label": [n for n in NAMES if rng.random() < 0.4]} for t in tiny_texts(count, seed)]
    return write_lines(path, [json.dumps(row) for row in rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multi-label")
    tiny_checkpoint(root / "expert", names=NAMES, problem_type=PROBLEM, seed=3)
    write(root / "rows.jsonl", seed=3)
    return root


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(inspect_checkpoint(folder / "expert", "tiny"), torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(folder: Path, loaded: LoadedModel) -> list[Example]:
    spec = dataset_spec(folder / "rows.jsonl")
    rows = sample(RowFile(spec), spec, None)
    return tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples


def likelihoods(folder: Path, examples: list[Example], own: bool) -> dict[ScoreName, np.ndarray]:
    """Of each row: the sum over sets of labels of `p(set) (d log p(set) / dm)^2`, one at a time, in float64."""
    model = float64_model(folder / "expert")
    masks = insert_masks(model)
    found = []
    for example in examples:
        ids = {name: torch.tensor([values]) for name, values in example.encoding.items()}
        z = model(**ids).logits[0]
        total = [torch.zeros_like(mask) for mask in masks]
        for chosen in [example.label] if own else product((0.0, 1.0), repeat=3):
            y = torch.tensor(chosen, dtype=torch.float64)
            log_p = -torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
            weight = 1.0 if own else float(log_p.detach().exp())
            for sum_, g in zip(total, torch.autograd.grad(log_p, masks, retain_graph=True), strict=True):
                sum_ += weight * g**2
        found.append(total)
    heads, neurons = (torch.stack(kind).mean(0).numpy() for kind in zip(*found, strict=True))
    return {
        named(f"layers.{i}.{kind}"): of[i]
        for i in range(LAYERS)
        for kind, of in (("heads", heads), ("neurons", neurons))
    }


def test_expected_scores_are_the_expectation_over_all_sets_of_labels(
    folder: Path, loaded: LoadedModel, examples: list[Example]
) -> None:
    found = score(loaded, examples, estimator_for("auto", loaded.task, 0), "float32", "rows", silent).scores()
    for name, exact in likelihoods(folder, examples, own=False).items():
        np.testing.assert_allclose(found[name].numpy(), exact, rtol=1e-4)


def test_empirical_scores_are_of_the_rows_own_labels(
    folder: Path, loaded: LoadedModel, examples: list[Example]
) -> None:
    found = score(loaded, examples, Estimator("empirical"), "float32", "rows", silent).scores()
    for name, exact in likelihoods(folder, examples, own=True).items():
        np.testing.assert_allclose(found[name].numpy(), exact, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("of_each", [int, float, bool])
def test_a_value_for_each_label_is_the_same_whatever_its_type(
    folder: Path, tmp_path: Path, loaded: LoadedModel, examples: list[Example], suffix: str, of_each: type
) -> None:
    spec = dataset_spec(folder / "rows.jsonl")
    rows = [
        {"text": row.text, "label": [of_each(name in row.label) for name in NAMES]}
        for row in sample(RowFile(spec), spec, None)
    ]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        write_lines(file, [json.dumps(row) for row in rows])
    spec = dataset_spec(file)
    read = sample(read_parquet(spec) if suffix == ".parquet" else RowFile(spec), spec, None, shuffle=False)
    again = tokenize(read, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples
    assert [one.label for one in again] == [one.label for one in examples]


def test_sampled_scores_tend_to_the_expected_ones(loaded: LoadedModel, examples: list[Example]) -> None:
    expected = score(loaded, examples, estimator_for("expected", loaded.task, 0), "float32", "rows", silent).scores()
    draws = []
    for seed in range(60):
        estimator = estimator_for("sampled", loaded.task, seed)
        assert estimator.name == "sampled"
        draws.append(score(loaded, examples, estimator, "float32", "rows", silent).scores())
    for name, exact in expected.items():
        drawn = torch.stack([of[name] for of in draws]).mean(-1)  # of the layer, for each seed
        error = float(drawn.std()) / len(draws) ** 0.5
        assert abs(float(drawn.mean()) - float(exact.mean())) < 4 * error


def test_what_is_drawn_does_not_depend_on_the_batch(loaded: LoadedModel, examples: list[Example]) -> None:
    estimator = estimator_for("sampled", loaded.task, 5)
    together = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    alone = score(loaded, examples, estimator, "float32", "rows", silent, [[e] for e in examples]).scores()
    for name, of in together.items():
        assert float((of - alone[name]).norm() / of.norm()) < 1e-5


def test_the_published_rule_takes_the_models_own_loss(
    folder: Path, loaded: LoadedModel, examples: list[Example]
) -> None:
    """One batch: the squared gradient of its loss, the mean over rows and labels."""
    model = float64_model(folder / "expert")
    masks = insert_masks(model)
    losses = []
    for example in examples:
        ids = {name: torch.tensor([values]) for name, values in example.encoding.items()}
        losses.append(model(**ids, labels=torch.tensor([example.label], dtype=torch.float64)).loss)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), masks)
    found = paper_scores(loaded, examples, "rows", silent)
    for layer in range(LAYERS):
        for kind, of in zip(("heads", "neurons"), gradients, strict=True):
            exact = of[layer].numpy() ** 2
            np.testing.assert_allclose(found[named(f"layers.{layer}.{kind}")].numpy(), exact, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    ("label", "names", "value"),
    [
        ([], None, (0, 0, 0)),
        ([2, 0], None, (1, 0, 1)),
        (["praise"], None, (0, 0, 1)),
        (["1"], None, (0, 1, 0)),
        ([0.0, 1.0, 1.0], None, (0, 1, 1)),
        ([True, False, False], None, (1, 0, 0)),
        ([0, 0, 1], None, (0, 0, 1)),  # no ids, since one would be there twice
        ([0, 1], None, (1, 1, 0)),
        ([0], ("praise", "insult"), (0, 0, 1)),
        ([0.0, 1.0], ("praise", "insult"), (1, 0, 0)),
    ],
)
def test_labels_are_the_ones_that_apply(
    label: list[object], names: tuple[str, ...] | None, value: tuple[float, ...]
) -> None:
    assert LabelMap(TASK, names).value(label, "rows.jsonl", Place("line", 1)) == value


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("insult", "label is str, not a list of the labels that apply"),
        (1, "label is int, not a list"),
        (None, "label is NoneType, not a list"),
        ([3], "ids are 0 to 2"),
        (["prais"], "did you mean 'praise'"),
        ([0.0, 1.0], "not 3 times 0.0 or 1.0"),
        ([0.0, 1.0, 0.5], "not 3 times 0.0 or 1.0"),
        ([[0]], "list, not an id or a name"),
    ],
)
def test_other_labels_are_refused(label: object, words: str) -> None:
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 4: .*" + words):
        LabelMap(TASK).value(label, "rows.jsonl", Place("line", 4))


@pytest.mark.parametrize("name", ["f1", "accuracy"])
def test_intervals_are_those_of_scikit_learn_on_the_same_resamples(name: str) -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 2, (40, 3)).astype(float), rng.integers(0, 2, (40, 3)).astype(float)
    found = bootstrap(name, TASK, labels, [predicted, labels], seed=7)
    again = np.random.default_rng(7)
    for resample in range(20):
        drawn = again.integers(0, 40, 40)
        wanted = (
            sk.f1_score(labels[drawn], predicted[drawn], average="micro", zero_division=0)
            if name == "f1"
            else sk.accuracy_score(labels[drawn], predicted[drawn])
        )
        assert found[0, resample] == pytest.approx(wanted, abs=1e-12)
    assert (found[1] == 1).all()
    assert metric_for(name, TASK)(labels, predicted) < 1


def test_a_merge_with_another_task_is_evaluated_and_loads(folder: Path, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held-out.jsonl", seed=8, count=60)
    evaluation = EvaluationSpec(**dataset_spec(held_out).model_dump(), metric="f1")
    other = tiny_checkpoint(tmp_path / "other", labels=2, seed=4)
    models = [
        model_spec(folder / "expert", folder / "rows.jsonl", evaluation=evaluation),
        model_spec(other, folder / "rows.jsonl"),
    ]
    spec = merge_spec(tmp_path / "out", models, {"name": "mask_fisher", "precision": "float32"}, evaluate=True)
    result = Engine(torch.device("cpu")).merge(spec, silent)
    merged = tmp_path / "out" / "models" / models[0].name
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert model.config.problem_type == PROBLEM
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    with torch.no_grad():
        logits = torch.stack([model(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows])
    labels = np.array([[float(name in row["label"]) for name in NAMES] for row in rows])
    wanted = sk.f1_score(labels, (logits > 0).numpy().astype(float), average="micro", zero_division=0)
    assert result.metrics is not None
    metric = result.metrics[models[0].name]
    assert metric.merged == pytest.approx(wanted, abs=1e-9)
    assert metric.interval[0] <= metric.merged <= metric.interval[1]
