"""Smoothed metrics, against their definition written out row by row, and against the metrics that they smooth."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.engine.catalog.primitives.errors import Place
from worker.engine.catalog.tasks import (
    Classification,
    MetricName,
    MultiLabel,
    QuestionAnswering,
    Regression,
    Task,
    TokenClassification,
)
from worker.engine.evaluation.metrics import metric_for
from worker.engine.inputs.examples import Example, Passage
from worker.engine.tasks import kind_of, squad
from worker.engine.tasks import smoothing as module
from worker.engine.tasks.metrics import Array
from worker.engine.tasks.smoothing import WIDTH

TWO, THREE = Classification(2, {}), Classification(3, {})
SEVERAL, VALUE = MultiLabel(3, {}), Regression(1, {})
OF_CLASSES: list[MetricName] = ["accuracy", "f1", "matthews"]
CASES: list[tuple[Task, MetricName]] = [
    *itertools.product([TWO, THREE], OF_CLASSES),
    (SEVERAL, "accuracy"),
    (SEVERAL, "f1"),
    (VALUE, "pearson"),
    (VALUE, "spearman"),
]


def drawn(task: Task, rows: int = 60, seed: int = 0) -> tuple[Array, Tensor]:
    """Labels, and logits that know something of them."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(rows, task.outputs))
    if task.name == "regression":
        labels = rng.normal(size=rows)
        return labels, torch.from_numpy(labels[:, None] + noise).float()
    if task.name == "multi_label":
        labels = (rng.random((rows, task.outputs)) < 0.4).astype(np.float64)
        return labels, torch.from_numpy(2 * labels - 1 + noise).float()
    labels = rng.integers(0, task.outputs, rows).astype(np.float64)
    return labels, torch.from_numpy(1.5 * np.eye(task.outputs)[labels.astype(int)] + noise).float()


def shares(task: Task, logits: Tensor) -> list[list[float]]:
    """Of each row's prediction, written out: the probability of each class, or that each label applies."""
    rows = [[float(value) for value in row] for row in logits.double()]
    if task.name == "classification":
        rows = [[value - sum(row) / len(row) for value in row] for row in rows]
    size = math.sqrt(sum(value**2 for row in rows for value in row) / (len(rows) * len(rows[0])))
    if task.name == "multi_label":
        return [[1 / (1 + math.exp(-value / (WIDTH * size))) for value in row] for row in rows]
    found = []
    for row in rows:
        powers = [math.exp(value / (WIDTH * size)) for value in row]
        found.append([power / sum(powers) for power in powers])
    return found


def of_table(name: MetricName, labels: Array, of_rows: list[list[float]]) -> float:
    """From the expected confusion table, [label][prediction]."""
    classes = len(of_rows[0])
    table = [[0.0] * classes for _ in range(classes)]
    for label, row in zip(labels, of_rows, strict=True):
        for c, share in enumerate(row):
            table[int(label)][c] += share
    actual = [sum(table[c]) for c in range(classes)]
    guessed = [sum(table[label][c] for label in range(classes)) for c in range(classes)]
    hits, rows = [table[c][c] for c in range(classes)], sum(actual)
    if name == "accuracy":
        return sum(hits) / rows
    if name == "f1":
        f1 = [2 * hits[c] / (actual[c] + guessed[c]) for c in range(classes)]
        return f1[1] if classes == 2 else sum(f1) / classes
    covariance = sum(hits) * rows - sum(a * g for a, g in zip(actual, guessed, strict=True))
    return covariance / math.sqrt((rows**2 - sum(a**2 for a in actual)) * (rows**2 - sum(g**2 for g in guessed)))


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("task", [TWO, THREE])
def test_of_classes_it_is_the_metric_of_the_expected_table(name: MetricName, task: Task) -> None:
    labels, logits = drawn(task)
    assert kind_of(task).smoothed(name, labels, logits) == pytest.approx(
        of_table(name, labels, shares(task, logits)), abs=1e-9
    )


def test_of_several_labels_it_is_that_of_each_decision() -> None:
    labels, logits = drawn(SEVERAL)
    of_rows = shares(SEVERAL, logits)
    right = [
        math.prod(s if y else 1 - s for s, y in zip(*pair, strict=True)) for pair in zip(of_rows, labels, strict=True)
    ]
    assert kind_of(SEVERAL).smoothed("accuracy", labels, logits) == pytest.approx(sum(right) / len(right), abs=1e-9)
    hits = sum(s * y for pair in zip(of_rows, labels, strict=True) for s, y in zip(*pair, strict=True))
    either = sum(s + y for pair in zip(of_rows, labels, strict=True) for s, y in zip(*pair, strict=True))
    assert kind_of(SEVERAL).smoothed("f1", labels, logits) == pytest.approx(2 * hits / either, abs=1e-9)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_where_the_step_is_narrow_it_is_the_metric(
    monkeypatch: pytest.MonkeyPatch, task: Task, name: MetricName
) -> None:
    monkeypatch.setattr(module, "WIDTH", 1e-9)
    labels, logits = drawn(task)
    expected = metric_for(name, task)(labels, kind_of(task).predicted(logits))
    assert kind_of(task).smoothed(name, labels, logits) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_how_large_logits_are_does_not_matter(task: Task, name: MetricName) -> None:
    labels, logits = drawn(task)
    assert kind_of(task).smoothed(name, labels, 1000 * logits) == pytest.approx(
        kind_of(task).smoothed(name, labels, logits), abs=1e-6
    )
    if task.name == "classification":
        moved = logits + torch.arange(len(logits))[:, None]
        assert kind_of(task).smoothed(name, labels, moved) == pytest.approx(
            kind_of(task).smoothed(name, labels, logits), abs=1e-4
        )


@pytest.mark.parametrize(("task", "name"), [case for case in CASES if case[0].name == "classification"])
def test_logits_that_say_nothing_are_no_error(task: Task, name: MetricName) -> None:
    labels, logits = drawn(task)
    expected = {"accuracy": 1 / task.outputs, "matthews": 0.0}
    found = kind_of(task).smoothed(name, labels, torch.ones_like(logits))
    assert found == pytest.approx(expected.get(name, found), abs=1e-12)
    assert math.isfinite(found)


def test_which_of_two_is_better_is_seen_more_often() -> None:
    """Of models that differ in how much they know, on many draws of few rows."""

    def model(labels: Array, knowing: float, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(knowing * np.eye(2)[labels.astype(int)] + rng.normal(size=(len(labels), 2)))

    rng = np.random.default_rng(0)
    seen = {"smoothed": 0, "itself": 0}
    for _ in range(300):
        labels = rng.integers(0, 2, 100).astype(np.float64)
        better, worse = model(labels, 2.0, rng), model(labels, 1.7, rng)
        seen["smoothed"] += kind_of(TWO).smoothed("accuracy", labels, better) > kind_of(TWO).smoothed(
            "accuracy", labels, worse
        )
        accuracies = [metric_for("accuracy", TWO)(labels, kind_of(TWO).predicted(one)) for one in (better, worse)]
        seen["itself"] += accuracies[0] > accuracies[1]
    assert seen["smoothed"] > seen["itself"] + 15


SCHEMES = {
    "IOB": ("O", "B-X", "I-X", "B-Y", "I-Y"),
    "BIOES": ("O", "B-X", "I-X", "E-X", "S-X"),
}


def of_words(scheme: str, rows: Sequence[int], seed: int) -> tuple[TokenClassification, Array, Tensor]:
    """Labels of words of rows of these lengths, and logits that know something of them."""
    names = SCHEMES[scheme]
    rng = np.random.default_rng(seed)
    own = rng.integers(0, len(names), sum(rows))
    starts = np.zeros(sum(rows))
    starts[np.cumsum([0, *rows[:-1]])] = 1
    logits = 1.5 * np.eye(len(names))[own] + rng.normal(size=(sum(rows), len(names)))
    task = TokenClassification(len(names), {name: index for index, name in enumerate(names)})
    return task, np.stack([own, starts], axis=1).astype(float), torch.from_numpy(logits).float()


def entities(task: TokenClassification, labels: Sequence[int], starts: Sequence[float]) -> set[tuple[int, int, str]]:
    """The first and last word and type of each entity, word by word as conlleval goes."""
    names = {index: name for name, index in task.label_ids.items()}
    found: set[tuple[int, int, str]] = set()
    begun: int | None = None
    for place, label in enumerate([*labels, 0]):
        part, _, kind = names[label].partition("-")
        before = names[labels[place - 1]] if place else "O"
        is_end = place == len(labels) or bool(starts[place])
        goes_on = not is_end and kind and before[2:] == kind and before[0] not in "ES" and part not in "BS"
        if begun is not None and not goes_on:
            found.add((begun, place - 1, before[2:]))
            begun = None
        if place < len(labels) and kind and not goes_on:
            begun = place
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (1, 1, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_f1_of_entities_is_that_of_the_numbers_expected_over_all_labellings(
    scheme: str, rows: Sequence[int], seed: int
) -> None:
    task, labels, logits = of_words(scheme, rows, seed)
    centred = logits.double() - logits.double().mean(1, keepdim=True)
    shares = (centred / (WIDTH * centred.square().mean().sqrt())).softmax(1).tolist()
    starts = labels[:, 1].tolist()
    wanted = entities(task, labels[:, 0].astype(int).tolist(), starts)
    found = right = 0.0
    for labelling in itertools.product(range(task.outputs), repeat=sum(rows)):
        share = math.prod(of_word[label] for of_word, label in zip(shares, labelling, strict=True))
        said = entities(task, labelling, starts)
        found += share * len(said)
        right += share * len(said & wanted)
    smoothed = kind_of(task).smoothed("entity_f1", labels, logits)
    assert smoothed == pytest.approx(2 * right / (found + len(wanted)) if wanted else 0.0, abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_f1_of_entities_is_the_limit_of_its_smoothed_form(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, labels, logits = of_words(scheme, (7, 9, 1, 12), 5)
    monkeypatch.setattr(module, "WIDTH", 1e-4)
    kind = kind_of(task)
    metric = metric_for("entity_f1", task)(labels, kind.predicted(logits))
    assert 0 < metric < 1
    assert kind.smoothed("entity_f1", labels, logits) == pytest.approx(metric, abs=1e-9)


def question(context: str, answers: Sequence[str], windows: Sequence[tuple[int, int]]) -> Example:
    """A row whose tokens are words: each window has a mark, and the context's words from one place to another."""
    ends = [*itertools.accumulate(len(word) + 1 for word in context.split())]
    words = [(end - 1 - len(word), end - 1) for word, end in zip(context.split(), ends, strict=True)]
    spans = tuple(span for first, last in windows for span in (None, *words[first:last]))
    inputs = tuple({"input_ids": [0] * (1 + last - first)} for first, last in windows)
    passage = Passage(context, spans, tuple(answers))
    return Example(0, Place("row", 1), inputs[0], None, tuple(range(len(spans))), passage, inputs[1:])


QUESTIONS = [
    question("red green blue grey", ["green blue"], [(0, 4)]),
    question("one two three four five", ["five", "four five"], [(0, 3), (2, 5)]),  # "three" is in both windows
    question("up and down", [], [(0, 3)]),
]


def smoothed_answers(name: MetricName, rows: Sequence[Example], logits: Tensor) -> float:
    """Written out: the sum of the logits of every candidate answer, and how right it is."""
    measure = squad.exact_match if name == "exact_match" else squad.f1
    values = iter(logits.double().tolist())
    of_rows: list[list[tuple[float, float]]] = []
    for row in rows:
        assert row.passage is not None
        assert row.passage.answers is not None
        text, answers, spans = row.passage.text, row.passage.answers, iter(row.passage.spans)
        sums: dict[tuple[int, int], float] = {}
        none = []
        for inputs in row.inputs:
            tokens = [(next(spans), *next(values)) for _ in inputs["input_ids"]]
            none.append(tokens[0][1] + tokens[0][2])
            for (first, start, _), (last, _, end) in itertools.combinations_with_replacement(tokens, 2):
                if first is not None and last is not None:
                    place = (first[0], last[1])
                    sums[place] = max(sums.get(place, -math.inf), start + end)
        candidates = [(value, measure(text[begins:ends], answers)) for (begins, ends), value in sums.items()]
        of_rows.append([*candidates, (min(none), float(not answers))])
    means = [sum(value for value, _ in row) / len(row) for row in of_rows]
    centred = [[(value - mean, right) for value, right in row] for row, mean in zip(of_rows, means, strict=True)]
    size = math.sqrt(sum(v**2 for row in centred for v, _ in row) / sum(map(len, centred)))
    expected = []
    for of_row in centred:
        powers = [math.exp(value / (WIDTH * size)) for value, _ in of_row]
        expected.append(sum(p * right for p, (_, right) in zip(powers, of_row, strict=True)) / sum(powers))
    return sum(expected) / len(expected)


@pytest.mark.parametrize("name", ["exact_match", "f1"])
def test_answers_are_right_as_far_as_they_are_expected_to_be(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    kind = kind_of(QuestionAnswering(2, {}))
    labels = kind.truth(QUESTIONS)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(sum(row.outputs for row in QUESTIONS), 2, generator=generator)
        found = kind.smoothed(name, labels, logits, QUESTIONS)
        assert found == pytest.approx(smoothed_answers(name, QUESTIONS, logits), abs=1e-9)
        assert kind.smoothed(name, labels, 100 * logits, QUESTIONS) == pytest.approx(found, abs=1e-6)
        with monkeypatch.context() as narrow:
            narrow.setattr(module, "WIDTH", 1e-9)
            itself = kind.metric(name)(labels, kind.predicted(logits, QUESTIONS))
            assert kind.smoothed(name, labels, logits, QUESTIONS) == pytest.approx(itself, abs=1e-9)
