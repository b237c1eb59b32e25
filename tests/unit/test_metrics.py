"""Metrics against their closed forms, and predictions and evaluations against the models themselves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import (
    Tensors,
    dataset_spec,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    read_rows,
    silent,
    tiny_checkpoint,
    write_rows,
)
from worker.engine.catalog.errors import NumericalError
from worker.engine.catalog.headers import inspect_checkpoint
from worker.engine.catalog.labels import METRICS, LabelMap, Task
from worker.engine.catalog.spec import EvaluationSpec, MetricName
from worker.engine.checkpoints.loading import load
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import Array, interval, likely_permutation, metric_for
from worker.engine.pipeline import Engine
from worker.engine.scoring.data import tokenize

TWO = Task("classification", 2, {})
THREE = Task("classification", 3, {})
REGRESSION = Task("regression", 1, {})
CPU = torch.device("cpu")

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
BINARY = ([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
# Of three labels: F1 of 0 is 2/3 (2 hits, 1 miss, 1 false), of 1 is 1/2 (1, 1, 1), of 2 is 4/5 (2, 1 miss, 0 false)
TERNARY = ([0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 0, 2, 2, 2])


def array(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("name", "task", "labels", "predictions", "value"),
    [
        ("accuracy", TWO, *BINARY, 7 / 10),
        ("f1", TWO, *BINARY, 2 * 3 / (2 * 3 + 1 + 2)),
        ("matthews", TWO, *BINARY, (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))),
        ("accuracy", THREE, *TERNARY, 6 / 8),
        ("f1", THREE, *TERNARY, (2 * 2 / (4 + 1 + 1) + 2 * 1 / (2 + 1 + 1) + 1) / 3),
        ("matthews", THREE, *TERNARY, (6 * 8 - (3 * 3 + 2 * 2 + 3 * 3)) / (64 - (9 + 4 + 9))),
        ("pearson", REGRESSION, [1, 2, 3], [1, 2, 4], 1.5 / math.sqrt(7 / 3)),
        ("pearson", REGRESSION, [1, 2, 3, 4], [-2, -4, -6, -8], -1),
        ("spearman", REGRESSION, [1, 2, 3, 4], [1, 10, 100, 50], 1 - 6 * 2 / (4 * 15)),
        ("spearman", REGRESSION, [1, 2, 2, 4], [1, 3, 2, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        # All predicted alike, as by a model that learnt nothing.
        ("f1", TWO, [0, 1, 0], [0, 0, 0], 0),
        ("f1", TWO, [0, 0], [0, 0], 0),
        ("f1", TWO, [1, 1], [1, 1], 1),
        ("matthews", TWO, [0, 1, 0], [0, 0, 0], 0),
        ("matthews", TWO, [1, 1], [1, 1], 0),
        ("pearson", REGRESSION, [1, 2, 3], [5, 5, 5], 0),
        ("spearman", REGRESSION, [1, 1, 1], [1, 2, 3], 0),
        ("accuracy", TWO, [1], [1], 1),
        ("pearson", REGRESSION, [1], [2], 0),
    ],
)
def test_metrics_have_their_closed_forms(
    name: MetricName, task: Task, labels: list[float], predictions: list[float], value: float
) -> None:
    assert metric_for(name, task)(array(labels), array(predictions)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("task", [TWO, THREE, REGRESSION], ids=["two", "three", "regression"])
def test_a_perfect_prediction_is_worth_one(task: Task) -> None:
    labels = array([0, 1, 2, 1, 0] if task is not TWO else [0, 1, 0, 1, 0])
    for name in METRICS[task.problem]:
        assert metric_for(name, task)(labels, labels) == pytest.approx(1)


@pytest.mark.parametrize(("rows", "hits"), [(2000, 1600), (50, 50)])
def test_the_interval_of_an_accuracy_is_that_of_a_binomial_share(rows: int, hits: int) -> None:
    labels, predictions = np.ones(rows), array([1] * hits + [0] * (rows - hits))
    low, high = interval(metric_for("accuracy", TWO), labels, predictions, seed=0)
    share = hits / rows
    half = 1.96 * math.sqrt(share * (1 - share) / rows)
    assert low == pytest.approx(share - half, abs=0.12 * half)
    assert high == pytest.approx(share + half, abs=0.12 * half)


def test_the_interval_follows_from_its_seed() -> None:
    metric = metric_for("pearson", REGRESSION)
    labels, predictions = np.arange(10.0), np.arange(10.0) ** 2
    assert interval(metric, labels, predictions, seed=1) == interval(metric, labels, predictions, seed=1)
    assert interval(metric, labels, predictions, seed=1) != interval(metric, labels, predictions, seed=2)


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_one_row_has_an_interval_of_one_point(name: MetricName) -> None:
    low, high = interval(metric_for(name, TWO), array([1]), array([1]), seed=0)
    assert low == high == metric_for(name, TWO)(array([1]), array([1]))


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_resamples_without_a_label_do_not_disturb(name: MetricName) -> None:
    labels, predictions = array([0, 0, 0, 0, 1]), array([0, 0, 0, 1, 1])
    low, high = interval(metric_for(name, TWO), labels, predictions, seed=0)
    assert -1 <= low <= metric_for(name, TWO)(labels, predictions) <= high <= 1


def own_logits(checkpoint: Path, rows: Path) -> torch.Tensor:
    """Of each row alone, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = [row.text for row in read_rows(rows)]
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_predictions_are_the_models_own_in_the_order_of_the_rows(tmp_path: Path, labels: int) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "m", labels=labels)
    file = write_rows(tmp_path / "rows.jsonl", count=50, labels=labels)
    loaded = load(inspect_checkpoint(checkpoint, "tiny"), CPU)
    spec = dataset_spec(file)
    rows = read_rows(file)
    examples = tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples
    done: list[int] = []
    found = predict(loaded, examples, "float32", done.append)
    logits = own_logits(checkpoint, file)
    expected = logits[:, 0] if labels == 1 else logits.argmax(-1)
    np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-4, atol=1e-6)
    assert sum(done) == 50


def test_logits_that_are_not_finite_are_an_error_that_names_the_model(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "m")

    def overflow(tensors: Tensors) -> None:
        tensors["classifier.weight"].fill_(3e38)

    edit_tensors(checkpoint, overflow)
    loaded = load(inspect_checkpoint(checkpoint, "local:huge"), CPU)
    file = write_rows(tmp_path / "rows.jsonl", count=4)
    spec, rows = dataset_spec(file), read_rows(file)
    examples = tokenize(rows, spec, loaded.tokenizer, loaded.max_length, LabelMap(loaded.task)).examples
    with pytest.raises(NumericalError, match="local:huge gives logits that are NaN or infinite"):
        predict(loaded, examples, "float32", silent)


def test_an_evaluation_compares_expert_average_and_merge_on_the_same_rows(tmp_path: Path) -> None:
    models, files, checkpoints = [], [], []
    metrics: tuple[MetricName, ...] = ("accuracy", "pearson", "f1")
    for seed, (labels, metric) in enumerate(zip((2, 1, 3), metrics, strict=True)):
        checkpoints.append(tiny_checkpoint(tmp_path / f"m{seed}", labels=labels, seed=seed))
        files.append(write_rows(tmp_path / f"m{seed}.jsonl", count=60, labels=labels, seed=seed))
        evaluation = EvaluationSpec(**dataset_spec(files[-1]).model_dump(), metric=metric)
        models.append(model_spec(checkpoints[-1], files[-1], evaluation=evaluation))
    result = Engine().merge(merge_spec(tmp_path / "out", models, evaluate=True), silent)
    assert result.metrics is not None
    versions = [read_model(path) for path in checkpoints]
    tasks = (TWO, REGRESSION, THREE)
    for model, checkpoint, file, metric, task, version in zip(
        models, checkpoints, files, metrics, tasks, versions, strict=True
    ):
        averaged = tiny_checkpoint(tmp_path / f"average-{model.name}", labels=task.outputs)
        mean = {
            name: tensor if name.startswith("classifier") else torch.stack([v[name] for v in versions]).mean(0)
            for name, tensor in version.items()
        }
        save_file(mean, averaged / "model.safetensors", {"format": "pt"})
        gold = array([row.label for row in read_rows(file)])
        found = result.metrics[model.name]
        for value, folder in (
            (found.expert, checkpoint),
            (found.merged, tmp_path / "out" / "models" / model.name),
            (found.average, averaged),
        ):
            logits = own_logits(folder, file)
            predictions = logits[:, 0] if task is REGRESSION else logits.argmax(-1)
            expected = metric_for(metric, task)(gold, predictions.double().numpy())
            assert value == pytest.approx(expected, abs=1e-5), (model.name, folder.name)
        assert (found.metric, found.examples) == (metric, 60)
        assert found.retention == (pytest.approx(found.merged / found.expert) if found.expert > 0 else None)
        assert found.interval[0] <= found.merged <= found.interval[1]
    retentions = [m.retention for m in result.metrics.values() if m.retention is not None]
    assert result.mean_retention == pytest.approx(np.mean(retentions))
    assert result.min_retention == min(retentions)


@pytest.mark.parametrize(
    ("labels", "predictions", "permutation"),
    [
        ([0, 1, 2] * 100, [0, 1, 2] * 100, None),
        ([0, 1, 2] * 100, [1, 2, 0] * 100, [1, 2, 0]),
        ([0, 1] * 100, [1, 0] * 100, [1, 0]),
        ([0, 1] * 100, [0, 1] * 20 + [1, 0] * 80, [1, 0]),
        ([0, 1] * 100, [0, 0] * 100, None),  # it always says the same, which no renaming explains
        ([0, 1] * 4, [1, 0] * 4, None),  # too few to tell
        (np.random.default_rng(0).integers(0, 5, 200), np.random.default_rng(1).integers(0, 5, 200), None),
    ],
)
def test_ids_that_mean_something_else_are_told_from_a_model_that_is_wrong(
    labels: Any, predictions: Any, permutation: list[int] | None
) -> None:
    outputs = int(max(labels)) + 1
    assert likely_permutation(array(labels), array(predictions), outputs) == permutation
