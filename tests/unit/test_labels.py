"""What a checkpoint predicts, and which of its labels a row's label is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.primitives.notes import Doubt, in_order
from worker.engine.catalog.tasks import (
    TASKS,
    Classification,
    LabelMap,
    MultiLabel,
    Regression,
    Task,
    check_metric,
    label_map,
    task_of,
)

NAMED = Classification(3, {"negative": 0, "neutral": 1, "positive": 2})
REGRESSION = Regression(1, {})
SEVERAL = MultiLabel(3, NAMED.label_ids)
NAMES = {"0": "negative", "1": "neutral", "2": "positive"}
BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
IDS = {name: int(index) for index, name in NAMES.items()}


def checkpoint(config: Mapping[str, Any], rows: int | None = None) -> CheckpointInfo:
    tensors = {}
    if rows is not None:
        tensors["classifier.weight"] = TensorInfo("local:expert", "classifier.weight", Path("x"), 8, "F32", (rows, 16))
    return CheckpointInfo("local:expert", Path("expert"), {**BERT, **config}, tensors, {}, Path("expert"))


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
    assert (task.name, task.outputs) == ("classification", outputs)


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
        (NAMED, None, None, ["the row has no label"]),
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


@pytest.mark.parametrize("task", [NAMED, SEVERAL, REGRESSION], ids=lambda task: cast(Task, task).name)
def test_each_task_has_its_own_metrics(task: Task) -> None:
    for of_task in TASKS:
        for metric in of_task.metrics:
            if metric in task.metrics:
                check_metric(metric, task, "rows")
            else:
                with pytest.raises(InvalidDataset, match=f"rows: metric {metric} is not one of {task.name}"):
                    check_metric(metric, task, "rows")
    assert task.metrics


STARS = Classification(5, {str(star): star - 1 for star in range(1, 6)})


def test_text_that_is_a_name_is_that_name_even_if_it_spells_a_number() -> None:
    assert LabelMap(STARS).value("5", "rows", Place("line", 1)) == 4
    with pytest.raises(InvalidDataset, match="label 4 may be an id or a name"):
        LabelMap(STARS).value(4, "rows", Place("line", 1))
    assert LabelMap(STARS, tuple(STARS.label_ids)).value(4, "rows", Place("line", 1)) == 4
    assert LabelMap(MORE_STARS, tuple(MORE_STARS.label_ids)).value(4, "rows", Place("line", 1)) == 4
    with pytest.raises(InvalidDataset, match="label '0' is unknown"):
        LabelMap(STARS).value("0", "rows", Place("line", 1))


def test_names_that_the_checkpoint_does_not_have_are_refused_without_any_row() -> None:
    with pytest.raises(InvalidDataset, match="label 'positve' of label_names is unknown; did you mean 'positive'"):
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
        (("Positive", "NEGATIVE"), [2, 0]),
        (("positive", "mixed", "negative"), [2, None, 0]),
    ],
)
def test_another_order_of_the_labels_is_known(
    names: tuple[str, ...] | None, permutation: list[int | None] | None
) -> None:
    assert LabelMap(NAMED, names).permutation == permutation


PLACE = Place("line", 1)
NLI = Classification(3, {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2})
PAIR = Classification(2, {"not_entailment": 0, "entailment": 1})
BARE = Classification(3, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
TWINS = Classification(3, {"Yes": 0, "yes": 1, "no": 2})
SIGNS = Classification(3, {"-1": 0, "0": 1, "1": 2})
MORE_STARS = Classification(5, {f"{star} star{'s' if star > 1 else ''}": star - 1 for star in range(1, 6)})
SHUFFLED = Classification(3, {"LABEL_2": 0, "LABEL_0": 1, "LABEL_1": 2})
TURNED = Classification(2, {"LABEL_1": 0, "LABEL_0": 1})
LEVELS = Classification(3, {"none": 0, "level 1": 1, "level 2": 2})
ILLNESSES = Classification(3, {"flu": 0, "Covid-19": 1, "H5N1": 2})
POINTS = MultiLabel(3, {"1 point": 0, "2 points": 1, "3 points": 2})
DIGITS = Classification(3, {"0": 0, "1": 1, "2": 2})
ANSWERS = Classification(2, {"Yes": 0, "No": 1})
THREE_ANSWERS = Classification(3, {"yes": 0, "no": 1, "maybe": 2})
TRUTHS = Classification(2, {"True": 0, "False": 1})
SIX = MultiLabel(6, {"toxic": 0, "severe": 1, "obscene": 2, "threat": 3, "insult": 4, "hate": 5}
)  # fmt: skip
TWO = MultiLabel(2, {"toxic": 0, "severe": 1})
ONE = MultiLabel(1, {"toxic": 0})
STARRED = MultiLabel(3, {"1": 0, "2": 1, "3": 2})


@pytest.mark.parametrize(
    ("task", "label", "value"),
    [
        (NLI, "entailment", 2),
        (NLI, " Neutral ", 1),
        (PAIR, "not entailment", 0),
        (PAIR, "Not-Entailment", 0),
        (PAIR, "_not_entailment_", 0),
        (TWINS, "Yes", 0),
        (TWINS, "yes", 1),
        (TWINS, "NO", 2),
        (SIGNS, "-1", 0),
        (SIGNS, "1", 2),
        (DIGITS, "1", 1),
        (DIGITS, "1.0", 1),
        (DIGITS, 1, 1),
        (BARE, "label_2", 2),
        (BARE, 2, 2),
        (LEVELS, 2, 2),
        (LEVELS, "1", 1),
        (ILLNESSES, 1, 1),
        (ILLNESSES, "2", 2),
        (MORE_STARS, "5 Stars", 4),
        (SHUFFLED, "LABEL_2", 0),
        (POINTS, [0, 1, 1], (0, 1, 1)),
        (POINTS, ["2 points"], (0, 1, 0)),
        (PAIR, True, 1),
        (PAIR, "false", 0),
        (PAIR, "True", 1),
        (TRUTHS, True, 0),
        (TRUTHS, False, 1),
        (TRUTHS, "true", 0),
        (SIX, [1, 1, 1, 1, 0, 1], (1, 1, 1, 1, 0, 1)),
        (SIX, [0, 0, 0, 0, 0, 0], (0, 0, 0, 0, 0, 0)),
        (SIX, [1.0, 0, 0, 0, 0, 1], (1, 0, 0, 0, 0, 1)),
        (SIX, ["1", "0", "0", "0", "0", "1"], (1, 0, 0, 0, 0, 1)),
        (SIX, [True, False, False, False, False, True], (1, 0, 0, 0, 0, 1)),
        (SIX, [0, 1], (1, 1, 0, 0, 0, 0)),
        (SIX, [5, 4, 3, 2, 1, 0], (1, 1, 1, 1, 1, 1)),
        (SIX, ["0", "5"], (1, 0, 0, 0, 0, 1)),
        (SIX, ["Toxic", "HATE"], (1, 0, 0, 0, 0, 1)),
        (SIX, ["toxic", 5], (1, 0, 0, 0, 0, 1)),
        (SIX, [], (0, 0, 0, 0, 0, 0)),
        (TWO, [1, 1], (1, 1)),
        (TWO, [0, 0], (0, 0)),
        (TWO, [1], (0, 1)),
        (TWO, [0.0, 1.0], (0, 1)),
        (ONE, [1], (1,)),
        (ONE, [0.0], (0,)),
        (STARRED, ["1", "3"], (1, 0, 1)),
        (ANSWERS, True, 0),
        (ANSWERS, "false", 1),
        (THREE_ANSWERS, 0, 0),
        (THREE_ANSWERS, 1, 1),
        (STARRED, [1, 0, 1], (1, 0, 1)),
    ],
    ids=str,
)
def test_a_label_that_can_mean_one_thing_means_that(task: Task, label: Any, value: Any) -> None:
    assert LabelMap(task).value(label, "rows", PLACE) == value


@pytest.mark.parametrize(
    ("task", "label", "words"),
    [
        (TWINS, "YES", ["did you mean 'Yes' or 'yes'?"]),
        (SIGNS, -1, ["may be an id or a name"]),
        (SIGNS, 0, ["may be an id or a name"]),
        (MORE_STARS, 5, ["label 5", "the label 0 '1 star'", "by 1", "label_names"]),
        (MORE_STARS, 0, ["may be an id or the number in a name"]),
        (MORE_STARS, "4", ["label 4 may be an id or the number in a name"]),
        (MORE_STARS, 4.0, ["label 4 may be an id or the number in a name"]),
        (SHUFFLED, 0, ["label 0 may be an id", "the label 0 'LABEL_2'", "by 2"]),
        (TURNED, True, ["may be an id", "'LABEL_1'"]),
        (POINTS, [0, 2], ["label 0 may be an id", "'1 point'"]),
        (NAMED, True, ["true", "3 labels"]),
        (TRUTHS, 0, ["label 0 may be an id", "the label 0 'True'", "by 1"]),
        (ANSWERS, 1, ["label 1 may be an id", "the label 0 'Yes'", "by 1"]),
        (ANSWERS, "0", ["label 0 may be an id"]),
        (NAMED, -1, ["out of range", "test splits"]),
        (NAMED, [0, 0, 1], ["list"]),
        (NAMED, " ", ["the row has no label"]),
        (BARE, "entailment", ["unknown", "LABEL_0"]),
        (SIX, [1, 1], ["twice"]),
        (SIX, [3, 3], ["twice"]),
        (SIX, ["toxic", "Toxic"], ["twice"]),
        (SIX, [1, 1, 1, 1, 0], ["twice"]),
        (SIX, [1, 1, 1, 1, 0, 2], ["twice"]),
        (SIX, [1.0, 0.0], ["6 times 0.0 or 1.0"]),
        (SIX, [True, False], ["6 times 0.0 or 1.0"]),
        (SIX, [0.5] * 6, ["6 times 0.0 or 1.0"]),
        (SIX, [6], ["out of range"]),
        (SIX, [None], ["no label"]),
        (SIX, None, ["NoneType"]),
        (SIX, "toxic", ["str", "CSV has none"]),
        (SIX, {"toxic": 1}, ["dict"]),
        (SIX, [[1, 0]], ["list"]),
        (TWO, [0, 1], ["[0, 1] may be ids or a value for each label"]),
        (TWO, ["1", "0"], ["may be ids or a value for each label"]),
        (ONE, [0], ["may be ids or a value for each label"]),
        (STARRED, [1, 3], ["may be an id or a name"]),
    ],
    ids=str,
)
def test_a_label_that_may_mean_two_things_is_refused(task: Task, label: Any, words: list[str]) -> None:
    with pytest.raises(InvalidDataset) as caught:
        LabelMap(task).value(label, "rows", PLACE)
    assert not [word for word in words if word not in caught.value.message], caught.value.message


DEFAULTS = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
DEFAULT_IDS = {name: int(index) for index, name in DEFAULTS.items()}


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": NAMES, "label2id": DEFAULT_IDS},
        {"id2label": NAMES, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
        {"id2label": DEFAULTS, "label2id": IDS},
        {"label2id": IDS, "num_labels": 3},
        {"id2label": NAMES, "label2id": {"Positive": 2, "Neutral": 1, "Negative": 0}},
        {"id2label": NAMES, "label2id": {**IDS, "pos": 2, "neg": 0}},
        {"id2label": NAMES, "label2id": {name: str(index) for name, index in IDS.items()}},
    ],
    ids=str,
)
def test_names_are_known_whichever_table_has_them(config: dict[str, Any]) -> None:
    labels = LabelMap(task_of(checkpoint(config, rows=3)))
    assert [labels.value(name, "rows", PLACE) for name in IDS] == [0, 1, 2]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"id2label": NAMES, "label2id": {"negative": 2, "neutral": 1, "positive": 0}}, ["'negative'", "0", "2"]),
        ({"id2label": NAMES, "label2id": {"NEGATIVE": 2, "NEUTRAL": 1, "POSITIVE": 0}}, ["'NEGATIVE'", "0", "2"]),
        ({"id2label": NAMES, "label2id": {"bad": 0, "so-so": 1, "good": 2}}, ["'negative'", "'bad'"]),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, ["'a'", "0", "1"]),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}, "label2id": {"a": 1, "b": 2}}, ["'a'", "0", "1"]),
    ],
    ids=str,
)
def test_names_that_the_config_gives_two_ids_are_refused_and_ids_are_not(
    config: dict[str, Any], words: list[str]
) -> None:
    task = task_of(checkpoint(config, rows=3))
    assert LabelMap(task).value(2, "rows", PLACE) == 2
    name = next(iter(task.label_ids))
    lookups: list[Callable[[], object]] = [
        lambda: LabelMap(task).value(name, "rows", PLACE),
        lambda: label_map(task, "rows", None, ("x", "y", name), "expert"),
        lambda: label_map(task, "rows", [name], None, "expert"),
    ]
    for refused in lookups:
        with pytest.raises(InvalidDataset) as caught:
            refused()
        missing = [word for word in (*words, "cannot be looked up", "config.json") if word not in caught.value.message]
        assert not missing, caught.value.message


GLUE = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("task", "asked", "own", "ids", "words"),
    [
        (NLI, None, None, [0, 1, 2], []),
        (NLI, None, GLUE, [2, 1, 0], ["the checkpoint's 2, 1, 0"]),
        (NLI, GLUE, None, [2, 1, 0], ["the checkpoint's 2, 1, 0"]),
        (NLI, None, ("contradiction", "neutral", "entailment"), [0, 1, 2], []),
        (NLI, None, ("0", "1", "2"), [0, 1, 2], []),
        (NLI, None, ("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2], []),
        (NLI, GLUE, ("contradiction", "neutral", "entailment"), [2, 1, 0], ["was followed", "2, 1, 0"]),
        (BARE, None, ("LABEL_2", "LABEL_1", "LABEL_0"), [2, 1, 0], ["the checkpoint's 2, 1, 0"]),
        (BARE, None, GLUE, [0, 1, 2], ["not certain"]),
        (DIGITS, None, GLUE, [0, 1, 2], ["not certain"]),
        (BARE, ["LABEL_2", "LABEL_1", "LABEL_0"], GLUE, [2, 1, 0], ["the checkpoint's 2, 1, 0"]),
    ],
    ids=str,
)
def test_a_data_sets_ids_are_the_checkpoints_by_name(
    task: Task, asked: Any, own: Any, ids: list[int], words: list[str]
) -> None:
    labels, notes = label_map(task, "rows", asked, own, "expert")
    assert [labels.value(index, "rows", PLACE) for index in range(3)] == ids
    said = " ".join(notes)
    assert not [word for word in words if word not in said], said
    assert bool(notes) == bool(words)
    is_doubtful = {"was followed", "not certain"} & set(words)
    assert bool(is_doubtful) == any(isinstance(note, Doubt) for note in notes)


@pytest.mark.parametrize("task", [NLI, STARS, SIX], ids=str)
@pytest.mark.parametrize("own", [("pos", "neg"), ("business", "sports", "world")])
def test_names_that_are_none_of_the_checkpoints_give_no_number(task: Task, own: tuple[str, ...]) -> None:
    with pytest.raises(InvalidDataset, match=rf"rows: it calls its labels {own[0]}, .* say with label_names"):
        label_map(task, "rows", None, own, "expert")


def test_where_some_names_are_the_checkpoints_rows_of_the_others_are_refused() -> None:
    labels, _ = label_map(PAIR, "rows", None, GLUE, "expert")
    assert labels.value(0, "rows", PLACE) == 1
    with pytest.raises(InvalidDataset, match="line 1: label 'neutral' is unknown"):
        labels.value(1, "rows", PLACE)


def test_two_names_of_one_label_are_refused() -> None:
    for asked, own in ((["Neutral", "neutral"], None), (None, ("Neutral", "NEUTRAL", "positive"))):
        with pytest.raises(InvalidDataset, match=r"'Neutral' and '(neutral|NEUTRAL)' are the same label"):
            label_map(NAMED, "rows", asked, own, "expert")


def test_classes_as_numbers_of_a_regression_are_a_doubt() -> None:
    labels, [note] = label_map(REGRESSION, "rows", None, ("low", "high"), "expert")
    assert labels.value(1, "rows", PLACE) == 1.0
    assert isinstance(note, Doubt)
    assert "low, high" in note
    assert label_map(REGRESSION, "rows", None, ("0", "1"), "expert")[1] == []


@pytest.mark.parametrize(
    ("labels", "begins"),
    [
        ([1, 2, 2, 1], True),
        (["1", "2"], True),
        ([1.0, 2.0], True),
        ([0, 1, 2], False),
        ([1, 1], False),
        (["neutral", "positive"], False),
        ([], False),
    ],
)
def test_ids_that_begin_at_one_are_suspected(labels: list[Any], begins: bool) -> None:
    assert LabelMap(NAMED).begins_at_one(labels) == begins
    assert not LabelMap(NAMED, tuple(NAMED.label_ids)).begins_at_one(labels)


@pytest.mark.parametrize(
    ("task", "labels", "reads"),
    [
        (PAIR, [True, False], True),
        (PAIR, ["True", "false"], True),
        (PAIR, [1, 0], False),
        (PAIR, ["entailment"], False),
        (ANSWERS, [True, False], False),
        (TRUTHS, [True, False], False),
        (Classification(2, {"LABEL_0": 0, "LABEL_1": 1}), [True, False], False),
    ],
)
def test_truth_values_that_were_taken_as_ids_are_suspected(task: Task, labels: list[Any], reads: bool) -> None:
    assert LabelMap(task).reads_truth_as_ids(labels) == reads
    assert not LabelMap(task, tuple(task.label_ids)).reads_truth_as_ids(labels)


def test_doubts_come_first_and_every_note_once() -> None:
    notes = in_order(["a", Doubt("b"), "c", "a", Doubt("d"), Doubt("b")])
    assert notes == ["b", "d", "a", "c"]
    assert {type(note) for note in notes} == {str}
