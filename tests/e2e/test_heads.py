"""Heads besides those of sequence classification, on the running service: rows in their own columns."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, assert_problem
from tests.tiny import tiny_checkpoint, write_lines
from tests.tiny_families import WORDS

Recipe = dict[str, Any]
ENTITIES = ("O", "B-PER", "I-PER")


def of_words(rng: random.Random) -> dict[str, Any]:
    words = rng.choices(WORDS, k=rng.randint(2, 9))
    return {"tokens": words, "label": [rng.choice(ENTITIES) for _ in words]}


def of_question(rng: random.Random) -> dict[str, Any]:
    words = rng.choices(WORDS, k=rng.randint(4, 9))
    first = rng.randrange(len(words))
    answers = {"text": [words[first]], "answer_start": [len(" ".join([*words[:first], ""]))]}
    none: dict[str, list[Any]] = {"text": [], "answer_start": []}
    question = " ".join(rng.choices(WORDS, k=3))
    return {"question": question, "context": " ".join(words), "answers": answers if rng.random() < 0.8 else none}


def of_text(rng: random.Random) -> dict[str, Any]:
    return {"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))}


def of_choices(rng: random.Random) -> dict[str, Any]:
    choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(2, 4))]
    return {"text": " ".join(rng.choices(WORDS, k=3)), "choices": choices, "label": rng.randrange(len(choices))}


KINDS = {
    "TokenClassification": of_words,
    "QuestionAnswering": of_question,
    "MaskedLM": of_text,
    "MultipleChoice": of_choices,
}
LABELS = {"TokenClassification": "label", "QuestionAnswering": "answers", "MultipleChoice": "label"}
METRICS = {
    "TokenClassification": ["accuracy", "entity_f1"],
    "QuestionAnswering": ["f1", "exact_match"],
    "MaskedLM": ["perplexity", "token_accuracy"],
    "MultipleChoice": ["accuracy"],
}
GOOD_QUESTION = {"question": "one", "context": "two three", "answers": {"text": ["three"], "answer_start": [4]}}
BAD_ROWS: dict[str, tuple[str, Mapping[str, Any], list[str]]] = {
    "an unknown label": ("TokenClassification", {"tokens": ["one"], "label": ["B-LOC"]}, ["line 151", "B-LOC"]),
    "too few labels": (
        "TokenClassification",
        {"tokens": ["a", "b"], "label": ["O"]},
        ["line 151", "2 words", "1 labels"],
    ),
    "a label of no choice": (
        "MultipleChoice",
        {"text": "one", "choices": ["two", "three"], "label": 2},
        ["line 151", "the choices are 0 to 1"],
    ),
    "an answer at another place": (
        "QuestionAnswering",
        {**GOOD_QUESTION, "answers": {"text": ["three"], "answer_start": [1]}},
        ["line 151", "an answer is not at character 1"],
    ),
    "a question without room": (
        "QuestionAnswering",
        {**GOOD_QUESTION, "question": "one " * 60},
        ["line 151", "its question has 60 tokens"],
    ),
    "no list": ("TokenClassification", {"tokens": 3, "label": ["O"]}, ["line 151", "column 'tokens'", "list of words"]),
}


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_lines(file, [json.dumps(row) for row in rows])


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """Two checkpoints of each kind, and rows beside the service's other inputs: `KIND-0`, `KIND-1`, `bad-…`."""
    for kind, make in KINDS.items():
        for seed in range(2):
            names = ENTITIES if kind == "TokenClassification" else None
            folder = tiny_inputs / "checkpoints" / f"{kind}-{seed}"
            tiny_checkpoint(folder, seed=seed + 1, names=names, task=kind)
            rng = random.Random(seed)
            write(tiny_inputs / "rows" / f"{kind}-{seed}.jsonl", [make(rng) for _ in range(80)])
    for number, (kind, row, _) in enumerate(BAD_ROWS.values()):
        rng = random.Random(5)
        write(tiny_inputs / "rows" / f"bad-{number}.jsonl", [*(KINDS[kind](rng) for _ in range(150)), row])
    return tiny_inputs


def recipe(kind: str, method: Recipe | None = None, metric: str | None = None) -> Recipe:
    models = []
    for name in (f"{kind}-0", f"{kind}-1"):
        rows = {"source": f"local:rows/{name}.jsonl"}
        evaluation = {**rows, "limit": 40, **({"metric": metric} if metric else {})}
        models.append(
            {"name": name, "checkpoint": f"local:checkpoints/{name}", "dataset": rows, "evaluation": evaluation}
        )
    return {"method": method or {"name": "mask_fisher", "examples": 40}, "models": models}


@pytest.mark.parametrize(
    ("kind", "metric"), [(kind, metric) for kind, metrics in METRICS.items() for metric in metrics]
)
def test_two_models_merge_and_are_evaluated(service: Service, inputs: Path, kind: str, metric: str) -> None:
    job = service.finished(service.submit(recipe(kind, metric=metric)))
    assert job["status"] == "succeeded", job["error"]
    for found in job["result"]["metrics"].values():
        assert found["metric"] == metric
        assert found["examples"] == 40
        assert found["interval"][0] <= found["merged"] <= found["interval"][1]
    kept = job["request"]["models"][0]["evaluation"]
    assert all(kept[column] == column for column in KINDS[kind](random.Random(0)))
    again = service.finished(service.submit(job["request"]))
    assert again["result"]["metrics"] == job["result"]["metrics"]


@pytest.mark.parametrize("kind", KINDS)
def test_auto_searches(service: Service, inputs: Path, kind: str) -> None:
    method = {"name": "auto", "candidates": ["average", "mask_fisher"], "trials": 4}
    job = service.finished(service.submit(recipe(kind, method)))
    assert job["status"] == "succeeded", job["error"]
    assert set(job["result"]["metrics"]) == {f"{kind}-0", f"{kind}-1"}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_fails_the_job_by_its_line(service: Service, inputs: Path, fault: str) -> None:
    kind, _, words = BAD_ROWS[fault]
    asked = recipe(kind, {"name": "mask_fisher", "estimator": "empirical"})
    number = list(BAD_ROWS).index(fault)
    rows = {"source": f"local:rows/bad-{number}.jsonl", LABELS[kind]: LABELS[kind]}
    asked["models"][1]["dataset"] = rows
    asked["models"][0]["dataset"][LABELS[kind]] = LABELS[kind]
    job = service.finished(service.submit(asked))
    assert job["status"] == "failed"
    assert job["error"]["code"] == "invalid_dataset"
    assert all(word in job["error"]["message"] for word in words), job["error"]
    assert service.get("/readyz").status_code == 200


def refused(kind: str, part: str, **columns: Any) -> Recipe:
    asked = recipe(kind)
    asked["models"][1][part] |= columns
    return asked


REFUSED: dict[str, tuple[Recipe, str, list[str]]] = {
    "text": (
        refused("TokenClassification", "dataset", text="text"), "invalid_request",
        ["models.1.dataset.text", "a token classification does not read it"],
    ),
    "a metric of other heads": (
        refused("TokenClassification", "evaluation", metric="pearson"), "invalid_dataset",
        ["metric pearson is not one of token_classification"],
    ),
    "labels of hidden tokens": (
        refused("MaskedLM", "evaluation", label="label"), "invalid_request",
        ["models.1.evaluation.label", "a masked language model does not read it"],
    ),
    "names of choices": (
        refused("MultipleChoice", "evaluation", label_names=["a", "b"]), "invalid_request",
        ["models.1.evaluation.label_names", "a multiple choice does not read it"],
    ),
    "text of a question": (
        refused("QuestionAnswering", "dataset", text="text"), "invalid_request",
        ["models.1.dataset.text", "a question answering does not read it"],
    ),
    "an estimator that takes too long": (
        {**recipe("QuestionAnswering"), "method": {"name": "mask_fisher", "estimator": "expected"}}, "invalid_request",
        ["method.estimator", "expected cannot be computed for a question answering"],
    ),
    "no such column": (
        refused("TokenClassification", "dataset", tokens="words"), "invalid_dataset", ["no column 'words'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_head_does_not_read_is_refused_before_the_job_is_accepted(
    service: Service, inputs: Path, case: str
) -> None:
    asked, code, words = REFUSED[case]
    response = service.post("/merge", json=asked)
    assert_problem(response, 422, code)
    assert all(word in json.dumps(response.json()) for word in words), response.text
