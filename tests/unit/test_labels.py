"""What a checkpoint predicts, and which of its labels a row's label is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from worker.engine.catalog.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.headers import CheckpointInfo, TensorInfo
from worker.engine.catalog.labels import METRICS, LabelMap, Task, check_metric, task_of

NAMED = Task("classification", 3, {"negative": 0, "neutral": 1, "positive": 2})
REGRESSION = Task("regression", 1, {})
SEVERAL = Task("multi_label", 3, NAMED.label_ids)
NAMES = {"0": "negative", "1": "neutral", "2": "positive"}
IDS = {name: int(index) for index, name in NAMES.items()}


def checkpoint(config: Mapping[str, Any], rows: int | None = None) -> CheckpointInfo:
    tensors = {}
    if rows is not None:
        tensors["classifier.weight"] = TensorInfo("local:expert", "classifier.weight", Path("x"), 8, "F32", (rows, 16))
    return CheckpointInfo("local:expert", Path("expert"), {"model_type": "bert", **config}, tensors, {}, Path("expert"))


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"id2label": NAMES, "label2id": IDS}, NAMED),
        ({"id2label": NAMES, "label2id": IDS, "problem_type": "single_label_classification"}, NAMED),
        ({"id2label": {"0": "score"}}, REGRESSION),
        ({"id2label": {"0": "score"}, "problem_type": "regression"}, REGRESSION),
        ({"num_labels": 1}, REGRESSION),
        ({"id2label": NAMES, "label2id": IDS, "problem_type": "multi_label_classification"}, SEVERAL),
    ],
    ids=str,
)
def test_the_task_follows_from_the_config_as_in_transformers(config: dict[str, Any], task: Task) -> None:
    assert task_of(checkpoint(config, rows=task.outputs)) == task


@pytest.mark.parametrize(("config", "outputs"), [({}, 2), ({"num_labels": 4}, 4)])
def test_labels_without_names_are_counted(config: dict[str, Any], outputs: int) -> None:
    task = task_of(checkpoint(config, rows=outputs))
    assert (task.problem, task.outputs) == ("classification", outputs)


def test_labels_named_one_way_only_are_known_by_name() -> None:
    task = task_of(checkpoint({"id2label": NAMES}, rows=3))
    assert LabelMap(task).value("positive", "rows", Place("line", 1)) == 2


def test_default_names_of_labels_are_known() -> None:
    """`save_pretrained` leaves out the names of two labels that were never named."""
    assert LabelMap(task_of(checkpoint({}, rows=2))).value("LABEL_1", "rows", Place("line", 1)) == 1


@pytest.mark.parametrize(
    ("config", "rows", "words"),
    [
        ({"id2label": NAMES}, 2, ["3 labels", "classifier.weight has shape [2, 16]"]),
        ({}, 3, ["2 labels", "[3, 16]"]),
        ({"id2label": NAMES, "problem_type": "regression"}, 3, ["regression with 3 outputs"]),
        ({"id2label": 5}, 2, ["id2label"]),
        ({"id2label": NAMES, "label2id": list(IDS)}, 3, ["label2id"]),
        ({"id2label": NAMES, "label2id": {**IDS, "positive": "third"}}, 3, ["label2id", "positive"]),
        ({"id2label": NAMES, "label2id": {**IDS, "positive": None}}, 3, ["label2id", "positive"]),
        ({"id2label": NAMES, "label2id": {**IDS, "positive": 7}}, 3, ["label2id", "positive", "7"]),
        ({"id2label": NAMES, "label2id": {**IDS, "positive": -1}}, 3, ["label2id", "positive", "-1"]),
    ],
    ids=str,
)
def test_a_config_whose_labels_make_no_sense_is_refused_by_its_key(
    config: dict[str, Any], rows: int, words: list[str]
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        task_of(checkpoint(config, rows))
    missing = [word for word in ("local:expert", *words) if word not in caught.value.message]
    assert not missing, caught.value.message


@pytest.mark.parametrize(
    ("label", "names", "value"),
    [
        (2, None, 2),
        (2.0, None, 2),
        (True, None, 1),
        ("neutral", None, 1),
        ("positive", ("positive", "negative"), 2),
        (0, ("positive", "negative"), 2),
        (1, ("positive", "negative"), 0),
        (1.0, ("positive", "negative"), 0),
        ("2", None, 2),
        ("1", ("positive", "negative"), 0),
        ("2.0", None, 2),
        (" 1 ", None, 1),
        ("1e0", None, 1),
    ],
)
def test_a_label_is_an_id_or_a_name_of_the_head(label: Any, names: tuple[str, ...] | None, value: int) -> None:
    found = LabelMap(NAMED, names).value(label, "rows", Place("line", 1))
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize(("label", "value"), [(3, 3.0), (-0.5, -0.5), (0, 0.0), ("3.5", 3.5), ("-1e-3", -0.001)])
def test_a_label_of_a_regression_is_a_number(label: Any, value: float) -> None:
    found = LabelMap(REGRESSION).value(label, "rows", Place("line", 1))
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize(
    ("task", "label", "names", "words"),
    [
        (NAMED, 3, None, ["label 3 is out of range", "0 to 2"]),
        (NAMED, -1, None, ["label -1 is out of range"]),
        (NAMED, 2, ("positive", "negative"), ["label 2 is out of range", "0 to 1"]),
        (NAMED, 0, ("good", "bad"), ["label 'good' is unknown", "negative, neutral, positive"]),
        (NAMED, "positiv", None, ["label 'positiv' is unknown", "did you mean 'positive'?"]),
        (NAMED, "7", None, ["label 7 is out of range"]),
        (NAMED, "-1", None, ["label -1 is out of range"]),
        (NAMED, "", None, ["label '' is unknown"]),
        (NAMED, None, None, ["NoneType"]),
        (NAMED, [0], None, ["list"]),
        (NAMED, 0.5, None, ["float"]),
        (NAMED, float("nan"), None, ["float"]),
        (NAMED, float("inf"), None, ["float"]),
        (NAMED, "0.5", None, ["float"]),
        (REGRESSION, "1_000", None, ["finite number"]),
        (REGRESSION, "1e400", None, ["finite number"]),
        (REGRESSION, "high", None, ["finite number"]),
        (REGRESSION, "nan", None, ["finite number"]),
        (REGRESSION, "", None, ["finite number"]),
        (REGRESSION, None, None, ["finite number"]),
        (REGRESSION, True, None, ["finite number"]),
        (REGRESSION, float("nan"), None, ["finite number"]),
        (REGRESSION, float("-inf"), None, ["finite number"]),
        (REGRESSION, 10**400, None, ["finite number"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_label_that_the_head_does_not_have_is_refused_with_its_line(
    task: Task, label: Any, names: tuple[str, ...] | None, words: list[str]
) -> None:
    with pytest.raises(InvalidDataset) as caught:
        LabelMap(task, names).value(label, "local:rows.jsonl", Place("line", 17))
    assert caught.value.detail["line"] == 17
    missing = [word for word in ("local:rows.jsonl, line 17", *words) if word not in caught.value.message]
    assert not missing, caught.value.message


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidDataset) as caught:
        LabelMap(NAMED).value("x" * 10_000, "rows", Place("line", 1))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("task", [NAMED, SEVERAL, REGRESSION], ids=lambda task: cast(Task, task).problem)
def test_each_task_has_its_own_metrics(task: Task) -> None:
    for metrics in METRICS.values():
        for metric in metrics:
            if metric in METRICS[task.problem]:
                check_metric(metric, task, "rows")
            else:
                with pytest.raises(InvalidDataset, match=f"rows: metric {metric} is not one of {task.problem}"):
                    check_metric(metric, task, "rows")
    assert METRICS[task.problem]


STARS = Task("classification", 5, {str(star): star - 1 for star in range(1, 6)})


def test_text_that_is_a_name_is_that_name_even_if_it_spells_a_number() -> None:
    assert LabelMap(STARS).value("5", "rows", Place("line", 1)) == 4
    assert LabelMap(STARS).value(4, "rows", Place("line", 1)) == 4
    with pytest.raises(InvalidDataset, match="label '0' is unknown"):
        LabelMap(STARS).value("0", "rows", Place("line", 1))


def test_names_that_the_checkpoint_does_not_have_are_refused_without_any_row() -> None:
    with pytest.raises(InvalidDataset, match="label 'positve' is unknown; did you mean 'positive'"):
        LabelMap(NAMED, ("negative", "positve")).check_names("rows")


def test_a_regression_has_no_label_names() -> None:
    LabelMap(REGRESSION).check_names("rows")
    with pytest.raises(InvalidDataset, match="label_names are for classes"):
        LabelMap(REGRESSION, ("low", "high")).check_names("rows")


@pytest.mark.parametrize(
    ("names", "permutation"),
    [
        (None, None),
        (("negative", "neutral", "positive"), None),
        (("negative", "neutral"), None),
        (("positive", "negative"), [2, 0]),
    ],
)
def test_another_order_of_the_labels_is_known(names: tuple[str, ...] | None, permutation: list[int] | None) -> None:
    assert LabelMap(NAMED, names).permutation == permutation
