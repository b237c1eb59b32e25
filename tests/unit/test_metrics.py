"""Metrics against their closed forms, and predictions and evaluations against the models themselves."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
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
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MetricResult, Version
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.catalog.tasks import Classification, LabelMap, MetricName, MultiLabel, Regression, Task
from worker.engine.evaluation import metrics as metrics_module
from worker.engine.evaluation.evaluate import predict
from worker.engine.evaluation.metrics import bootstrap, compare, metric_for
from worker.engine.inputs.examples import tokenize
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import load
from worker.engine.tasks.metrics import Array, likely_permutation

TWO = Classification(2, {})
THREE = Classification(3, {})
REGRESSION = Regression(1, {})
CPU = torch.device("cpu")

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
BINARY = ([1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
# Of three labels: F1 of 0 is 2/3 (2 hits, 1 miss, 1 false), of 1 is 1/2 (1, 1, 1), of 2 is 4/5 (2, 1 miss, 0 false)
TERNARY = ([0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 0, 2, 2, 2])


def array(values: Any) -> Array:
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
    for name in task.metrics:
        assert metric_for(name, task)(labels, labels) == pytest.approx(1)


def resampled_by_the_libraries(
    name: MetricName, task: Task, labels: Array, predictions: Sequence[Array], seed: int, resamples: int
) -> Array:
    """The bootstrap as one would write it down: draw rows, ask scikit-learn or SciPy, again and again."""
    rng, metric = np.random.default_rng(seed), metric_for(name, task)
    draws = [rng.integers(0, len(labels), len(labels)) for _ in range(resamples)]
    return array([[metric(labels[rows], predicted[rows]) for rows in draws] for predicted in predictions])


def random_classes(rows: int, classes: int, accuracies: Sequence[float], seed: int = 0) -> tuple[Array, list[Array]]:
    """Labels, and predictions that know so large a share of them and guess the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    guesses = [np.where(rng.random(rows) < share, labels, rng.integers(0, classes, rows)) for share in accuracies]
    return array(labels), [array(one) for one in guesses]


CLASSES = {
    "two": (TWO, *random_classes(60, 2, [0.9, 0.5])),
    "three": (THREE, *random_classes(60, 3, [0.9, 0.5])),
    "label never seen": (Classification(7, {}), *random_classes(40, 5, [0.7])),
    "few rows, some resamples of one class": (THREE, *random_classes(4, 3, [0.9, 0.2, 0.0])),
    "one class in labels": (TWO, array([1] * 9), [array([1] * 9), array([0] * 9), array([1, 0, 0] * 3)]),
    "one class in predictions": (THREE, array([0, 1, 2] * 4), [array([0] * 12), array([2] * 12)]),
    "none of label 1": (TWO, array([0] * 5), [array([0] * 5)]),
    "one row": (TWO, array([1]), [array([1]), array([0])]),
}


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize("case", CLASSES)
def test_resampled_metrics_of_classes_are_scikit_learns(name: MetricName, case: str) -> None:
    task, labels, predictions = CLASSES[case]
    expected = resampled_by_the_libraries(name, task, labels, predictions, seed=3, resamples=200)
    found = bootstrap(name, task, labels, predictions, seed=3)[:, :200]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def random_values(rows: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(rows)
    labels = rng.normal(size=rows)
    return labels, labels + rng.normal(size=rows)


VALUES, NOISY = random_values(50)
NUMBERS = {
    "no ties": (VALUES, [NOISY, -NOISY]),
    "ties": (np.round(VALUES), [np.round(NOISY), NOISY]),
    "far from zero": (VALUES + 1e6, [NOISY, 1e-3 * NOISY - 40]),
    "huge": (VALUES * 1e150, [NOISY * 1e-150, NOISY]),
    "an outlier that many resamples miss": (VALUES, [np.append(NOISY[1:], 1e9), NOISY]),
    "constant predictions": (VALUES, [np.full(50, 0.1), NOISY]),
    "constant labels": (np.full(50, 0.1), [NOISY]),
    "constant in many resamples": (array([0.1, 0.1, 0.1, 0.7]), [array([1, 2, 3, 4]), array([0.3, 0.3, 0.3, 0.2])]),
    "one row": (array([0.1]), [array([0.3])]),
}


@pytest.mark.parametrize(
    ("name", "task", "shape"),
    [("pearson", TWO, (4,)), ("f1", REGRESSION, (4,)), ("matthews", MultiLabel(2, {}), (4, 2))],
)
def test_no_other_metric_is_resampled_in_place_of_one_that_a_head_lacks(
    name: MetricName, task: Task, shape: tuple[int, ...]
) -> None:
    labels = np.zeros(shape)
    with pytest.raises((KeyError, ValueError), match=name):
        bootstrap(name, task, labels, [labels], seed=0)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("case", NUMBERS)
def test_resampled_correlations_are_scipys(name: MetricName, case: str) -> None:
    labels, predictions = NUMBERS[case]
    expected = resampled_by_the_libraries(name, REGRESSION, labels, predictions, seed=3, resamples=200)
    found = bootstrap(name, REGRESSION, labels, predictions, seed=3)[:, :200]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_resamples_draw_rows_with_all_their_outputs() -> None:
    rng = np.random.default_rng(1)
    outputs = rng.integers(1, 6, 30)
    labels, predicted = (array(rng.integers(0, 3, outputs.sum())) for _ in range(2))
    ends = np.cumsum(outputs)
    for name in THREE.metrics:
        again = np.random.default_rng(7)
        found = bootstrap(name, THREE, labels, [predicted], 7, outputs.tolist())
        for resample in range(20):
            rows = again.integers(0, 30, 30)
            drawn = np.concatenate([np.arange(ends[row] - outputs[row], ends[row]) for row in rows])
            assert found[0, resample] == pytest.approx(
                metric_for(name, THREE)(labels[drawn], predicted[drawn]), abs=1e-12
            )


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews", "pearson", "spearman"])
@pytest.mark.parametrize("chunk", [1, 200, 7 * 200 + 5])
def test_resamples_do_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, name: MetricName, chunk: int
) -> None:
    task = THREE if name in THREE.metrics else REGRESSION
    labels, predictions = random_classes(200, 3, [0.8, 0.6])
    at_once = bootstrap(name, task, labels, predictions, seed=0)
    monkeypatch.setattr(metrics_module, "CHUNK_VALUES", chunk)
    assert np.array_equal(bootstrap(name, task, labels, predictions, seed=0), at_once)


def compared(
    name: MetricName, task: Task, labels: Array, expert: Array, average: Array, merged: Array, seed: int = 0
) -> MetricResult:
    """With the head kept as it was."""
    evaluation = EvaluationSpec(source="local:rows.jsonl", metric=name, seed=seed)
    predictions: dict[Version, Array] = {
        "expert": expert,
        "average": average,
        "merged_kept_head": merged,
        "merged": merged,
    }
    return compare(evaluation, task, labels, predictions)


@pytest.mark.parametrize(("rows", "hits"), [(2000, 1600), (300, 285), (50, 50)])
def test_the_interval_of_an_accuracy_is_that_of_a_binomial_share(rows: int, hits: int) -> None:
    labels, predictions = np.ones(rows), array([1] * hits + [0] * (rows - hits))
    found = compared("accuracy", TWO, labels, labels, labels, predictions)
    # How many hits a resample draws is binomial; 1,000 resamples know its quantiles to a fifth of a deviation or a row.
    expected = stats.binom.ppf([0.025, 0.975], rows, hits / rows) / rows
    deviation = math.sqrt(hits / rows * (1 - hits / rows) / rows)
    np.testing.assert_allclose(array(found.interval), expected, atol=max(0.2 * deviation, 1 / rows) + 1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth, tries, holds = 0.8, 300, 0
    for seed in range(tries):
        labels = np.ones(200)
        predictions = (np.random.default_rng(seed).random(200) < truth).astype(np.float64)
        resampled = bootstrap("accuracy", TWO, labels, [predictions], seed)
        low, high = np.quantile(resampled, [0.025, 0.975])
        holds += bool(low <= truth <= high)
    # Binomial itself: at 300 tries, 0.95 is told to within 0.025 of two standard errors.
    assert 0.92 <= holds / tries <= 0.98


def test_a_comparison_has_the_metric_and_the_interval_of_each_version() -> None:
    labels, (expert, average, merged) = random_classes(300, 3, [0.9, 0.5, 0.7])
    found = compared("accuracy", THREE, labels, expert, average, merged, seed=5)
    by_library = resampled_by_the_libraries("accuracy", THREE, labels, [expert, average, merged], 5, 1000)
    quantiles = np.quantile(by_library, [0.025, 0.975], axis=1)
    values = (found.expert, found.average, found.merged)
    assert values == tuple(float(np.mean(labels == one)) for one in (expert, average, merged))
    assert found.merged_kept_head == found.merged
    assert found.retention == found.merged / found.expert
    intervals = [found.intervals["expert"], found.intervals["average"], found.intervals["merged"]]
    np.testing.assert_allclose(np.transpose(intervals), quantiles, atol=1e-12)
    assert found.interval == found.intervals["merged"] == found.intervals["merged_kept_head"]
    for index, difference in enumerate((found.differences["expert"], found.differences["average"])):
        assert difference.value == pytest.approx(values[2] - values[index])
        expected = np.quantile(by_library[2] - by_library[index], [0.025, 0.975])
        np.testing.assert_allclose(array(difference.interval), expected, atol=1e-12)
    kept = found.differences["merged_kept_head"]
    assert (kept.value, kept.interval) == (0.0, (0.0, 0.0))
    assert set(found.differences) == {"expert", "average", "merged_kept_head"}


def test_a_paired_interval_is_narrower_where_both_fail_on_the_same_rows() -> None:
    labels = np.ones(1000)
    expert = array([1] * 700 + [0] * 300)
    merged = array([0] * 20 + [1] * 690 + [0] * 290)  # 30 rows differ: 20 lost, 10 won
    found = compared("accuracy", TWO, labels, expert, expert, merged)
    low, high = found.differences["expert"].interval
    # Of the difference of two shares on the same rows: McNemar's variance, (b + c) / n^2 - (b - c)^2 / n^3.
    deviation = math.sqrt(30 / 1000**2 - 10**2 / 1000**3)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)
    unpaired = math.hypot(*(np.ptp(found.intervals[version]) for version in ("expert", "merged")))
    assert high - low < unpaired / 3


def test_a_comparison_follows_from_its_seed() -> None:
    labels, predictions = np.arange(10.0), np.arange(10.0) ** 2
    first, again, other = (
        compared("pearson", REGRESSION, labels, labels, labels, predictions, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.interval != other.interval


def test_a_metric_that_is_not_finite_is_an_error_that_names_the_rows() -> None:
    labels = array([1e308, -1e308, 1e308, 1e308])
    with np.errstate(all="ignore"), pytest.raises(NumericalError, match=r"pearson of local:rows.jsonl is not finite"):
        compared("pearson", REGRESSION, labels, labels, labels, labels)


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
        assert found.differences["average"].value == pytest.approx(found.merged - found.average)
    retentions = [m.retention for m in result.metrics.values() if m.retention is not None]
    assert result.mean_retention == pytest.approx(np.mean(retentions))
    assert result.min_retention == min(retentions)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == {name: found.model_dump(mode="json") for name, found in result.metrics.items()}
    pages = [(tmp_path / "out" / page).read_text() for page in ("README.md", "report.html")]
    for found in result.metrics.values():
        gain = found.differences["average"]
        for page in pages:
            assert f"{found.merged:.4f} ({found.interval[0]:.4f} to {found.interval[1]:.4f})" in page
            assert f"{gain.value:+z.4f} ({gain.interval[0]:+z.4f} to {gain.interval[1]:+z.4f})" in page


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
