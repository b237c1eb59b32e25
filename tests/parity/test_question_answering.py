"""Answers that are spans: scores, metrics and merges of every family against independent computations."""

import collections
import random
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow.parquet import write_table
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES as CLASSES

from tests.score_names import assert_same_in_norm
from tests.siblings import (
    TOLERANCE,
    Siblings,
    assert_batches_do_not_matter,
    assert_same_model,
    assert_squares,
    examples_of,
    merged_with_itself,
    scores_by_masks,
    searched,
    write_objects,
)
from tests.tiny import (
    dataset_spec,
    insert_masks,
    merge_spec,
    silent,
    tiny_checkpoint,
)
from tests.tiny_families import OF_EACH_FORM, TINY_FAMILIES, WORDS, TinyFamily
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import Classification, column_problems
from worker.engine.jobs.engine import Engine
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.scorer import paper_scores, score
from worker.engine.tasks import squad
from worker.engine.tasks.drawing import uniform

ROWS = 20
WITH_HEAD = [name for name in (*OF_EACH_FORM, "bart") if TINY_FAMILIES[name].model_type in CLASSES]
"""Families of each form of which the library has such a class."""
LONGEST = 30  # tokens of an answer
Row = dict[str, Any]


def rows_of(seed: int, unanswerable: float = 0.3, count: int = ROWS) -> list[Row]:
    """Questions about a run of words of their contexts; some have two answers."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, 9))
        context = " ".join(words)
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if rng.random() >= unanswerable:
            for _ in range(rng.randint(1, 2)):
                first = rng.randrange(len(words))
                answers["text"].append(" ".join(words[first : first + rng.randint(1, 3)]))
                answers["answer_start"].append(len(" ".join([*words[:first], ""])))
        rows.append({"question": " ".join(rng.choices(WORDS, k=3)), "context": context, "answers": answers})
    return rows


def spec_of(file: Path, **more: Any) -> DatasetSpec:
    return dataset_spec(file, label=None, **{"answers": "answers", **more})


def made(root: Path, tiny: TinyFamily) -> Siblings:
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_checkpoint(root / name, family=tiny, seed=seed, task="QuestionAnswering")
        write_objects(root / f"{name}.jsonl", rows_of(seed))
        write_objects(root / f"{name}-held-out.jsonl", rows_of(10 + seed))
        write_objects(root / f"{name}-answered.jsonl", rows_of(20 + seed, unanswerable=0))
    return Siblings(tiny, root, AutoModelForQuestionAnswering, spec_of)


def in_windows(case: Siblings) -> Siblings:
    """The same with so small a limit of tokens that most contexts are read in windows."""
    tokenizer = AutoTokenizer.from_pretrained(case.models["one"])
    rows = [row for file in case.root.glob("*.jsonl") for row in case.rows(file.stem)]
    limit = max(len(tokenizer(row["question"], "")["input_ids"]) for row in rows) + 4
    return replace(case, spec_of=partial(spec_of, max_length=limit))


@pytest.fixture(scope="module", params=WITH_HEAD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp(request.param), TINY_FAMILIES[request.param])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Siblings:
    return made(tmp_path_factory.mktemp("bert-alone"), TINY_FAMILIES["bert"])


# As transformers' run_qa does


STRIDE = 128
"""Tokens that windows share, or half of what a window has of the context where that is less."""


def windows_of(tokenizer: Any, row: Row, limit: int | None = None, stride: int | None = None) -> list[Any]:
    """The tokens of a row, or, where they are more than the limit, of windows that overlap."""
    texts = row["question"], row["context"]
    whole = tokenizer(*texts, return_offsets_mapping=True)
    if limit is None or len(whole["input_ids"]) <= limit:
        return [Encoded(whole, whole.sequence_ids())]
    room = limit - len(whole["input_ids"]) + whole.sequence_ids().count(1)
    cut = {"truncation": "only_second", "max_length": limit, "stride": stride or min(STRIDE, room // 2)}
    found = tokenizer(*texts, return_offsets_mapping=True, return_overflowing_tokens=True, **cut)
    return [
        Encoded(
            {name: found[name][k] for name in found if len(found[name]) == len(found["input_ids"])},
            found.sequence_ids(k),
        )
        for k in range(len(found["input_ids"]))
    ]


class Encoded(dict[str, Any]):
    """One window's tokens, with the text that each is of."""

    def __init__(self, encoded: Mapping[str, Any], parts: list[int | None]) -> None:
        super().__init__(encoded)
        self.parts = parts

    def sequence_ids(self) -> list[int | None]:
        return self.parts


def outputs_of(model: Any, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The logits of an answer's first and last token."""
    inputs = {n: torch.tensor([encoded[n]]) for n in ("input_ids", "token_type_ids") if n in encoded}
    if getattr(model.config, "type_vocab_size", 0) < 2 or model.config.model_type in ("distilbert", "llama", "mpnet"):
        inputs.pop("token_type_ids", None)
    found = model(**inputs)
    return found.start_logits[0], found.end_logits[0]


def wanted_tokens(encoded: Any, row: Row) -> tuple[int, int]:
    """As `prepare_train_features` of transformers' examples; the special token is the first one."""
    if not row["answers"]["text"]:
        return 0, 0
    start = row["answers"]["answer_start"][0]
    end = start + len(row["answers"]["text"][0])
    offsets, parts = encoded["offset_mapping"], encoded.sequence_ids()
    first, last = parts.index(1), len(parts) - 1 - parts[::-1].index(1)
    if not (offsets[first][0] <= start and offsets[last][1] >= end):
        return 0, 0
    while first < len(offsets) and parts[first] == 1 and offsets[first][0] <= start:
        first += 1
    while parts[last] == 1 and offsets[last][1] >= end:  # there, nothing stops at a question without a mark after it
        last -= 1
    return first - 1, last + 1


def scores_one_by_one(case: Siblings, estimator: Estimator) -> dict[ScoreName, Tensor]:
    """Scores by masks that are there: a row at a time, no padding, float64."""
    model, tokenizer = case.exact(), AutoTokenizer.from_pretrained(case.models["one"])
    blocks = f"{model.base_model_prefix}.{case.tiny.layers.partition('.')[2]}"
    masks = insert_masks(model, replace(case.tiny, layers=blocks))
    limit = case.spec().max_length

    def likelihoods() -> Iterator[list[tuple[float, Tensor]]]:
        for index, row in enumerate(case.rows()):
            likelihood = torch.zeros(())
            for window, encoded in enumerate(windows_of(tokenizer, row, limit)):
                logits = outputs_of(model, encoded)
                labels = wanted_tokens(encoded, row)
                if estimator.name == "sampled":
                    draws = [uniform(estimator.seed, index, 2 * window + side) for side in (0, 1)]
                    sums = [of.detach().softmax(0).cumsum(0)[:-1] for of in logits]
                    labels = int((sums[0] <= draws[0]).sum()), int((sums[1] <= draws[1]).sum())
                for of, label in zip(logits, labels, strict=True):
                    likelihood = likelihood + of.log_softmax(0)[label]
            yield [(1.0, likelihood)]

    return scores_by_masks(case.tiny, masks, likelihoods())


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("name", ["sampled", "empirical"])
def test_scores_are_those_of_masks_that_are_there(case: Siblings, name: Any, is_long: bool) -> None:
    case = in_windows(case) if is_long else case
    loaded, estimator = case.loaded(), Estimator(name, seed=5)
    examples = examples_of(loaded, case.spec())
    assert any(example.others for example in examples) == is_long
    found = score(loaded, examples, estimator, "float32", "rows", silent).scores()
    assert_same_in_norm(found, scores_one_by_one(case, estimator), TOLERANCE)


def test_scores_do_not_depend_on_batch_order_and_padding(case: Siblings) -> None:
    loaded, estimator = case.loaded(), Estimator("sampled", 3)
    assert_batches_do_not_matter(loaded, examples_of(loaded, case.spec()), estimator)


def test_a_model_merged_with_itself_is_itself(case: Siblings, engine: Engine, tmp_path: Path) -> None:
    folder = merged_with_itself(engine, tmp_path / "out", case)
    for name in ("first", "second"):
        assert_same_model(folder / "models" / name, case.models["one"])


# SQuAD's evaluation script, version 2.0, in its own words


def normalize_answer(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punctuation(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(s.lower())).split())


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks, pred_toks = normalize_answer(a_gold).split(), normalize_answer(a_pred).split()
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return float(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(pred_toks), num_same / len(gold_toks)
    return 2 * precision * recall / (precision + recall)


def answer_of(model: Any, tokenizer: Any, row: Row, may_have_none: bool, limit: int | None = None) -> str:
    """The likeliest span, pair by pair in every window, or none."""
    pairs, none = [], []
    for encoded in windows_of(tokenizer, row, limit):
        with torch.no_grad():
            start, end = outputs_of(model, encoded)
        offsets, parts = encoded["offset_mapping"], encoded.sequence_ids()
        none.append(float(start[0] + end[0]))
        pairs += [
            (float(start[i] + end[j]), row["context"][offsets[i][0] : offsets[j][1]])
            for i in range(len(parts))
            for j in range(i, min(i + LONGEST, len(parts)))
            if parts[i] == parts[j] == 1
        ]
    best, text = max(pairs)
    return "" if may_have_none and min(none) > best else text


@pytest.mark.parametrize(
    ("method", "metric", "rows", "is_long"),
    [
        ("mask_fisher", "f1", "held-out", True),
        ("aligned_regmean", "f1", "answered", False),
        ("fisher", "exact_match", "answered", True),
    ],
)
def test_siblings_keep_their_heads_and_are_evaluated_as_squad_does(
    case: Siblings, engine: Engine, tmp_path: Path, method: str, metric: str, rows: str, is_long: bool
) -> None:
    if case.tiny.decoder and method == "aligned_regmean":
        pytest.skip(
            "here no answer ends in a token of white space alone, and the example's best one of these rows does"
        )
    case = in_windows(case) if is_long else case
    limit = case.spec().max_length
    models = case.evaluated(metric, f"-{rows}")
    spec = merge_spec(tmp_path / "out", models, {"name": method}, evaluate=True, align_heads=True)
    result = engine.merge(spec, silent)
    assert result.metrics is not None
    assert [model.aligned_examples for model in result.models] == [ROWS, ROWS]
    for name in case.models:
        wanted = case.rows(f"{name}-{rows}")
        has_none = any(not row["answers"]["text"] for row in wanted)
        for version, path in case.versions(name, tmp_path / "out" / "models" / name).items():
            model = AutoModelForQuestionAnswering.from_pretrained(path).eval()
            tokenizer = AutoTokenizer.from_pretrained(path)
            total = 0.0
            for row in wanted:
                said, golds = answer_of(model, tokenizer, row, has_none, limit), row["answers"]["text"] or [""]
                if metric == "f1":
                    total += max(compute_f1(gold, said) for gold in golds)
                else:
                    total += max(float(normalize_answer(gold) == normalize_answer(said)) for gold in golds)
            assert getattr(result.metrics[name], version) == pytest.approx(total / ROWS, abs=1e-9)


def test_auto_searches_on_answers(bert: Siblings, engine: Engine, tmp_path: Path) -> None:
    result = searched(engine, tmp_path / "out", bert.evaluated("f1"))
    assert result.metrics is not None
    assert set(result.metrics) == set(bert.models)


def test_the_published_rule_takes_the_models_own_loss(bert: Siblings) -> None:
    loaded, model = bert.loaded(), bert.exact()
    examples = examples_of(loaded, bert.spec())
    masks = insert_masks(model, bert.tiny)
    losses = []
    for example in examples:
        first, last = example.labels
        ids = {name: torch.tensor([values]) for name, values in example.encoding.items()}
        losses.append(model(**ids, start_positions=torch.tensor([first]), end_positions=torch.tensor([last])).loss)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), masks)
    found = paper_scores(loaded, examples, "rows", silent)
    assert_squares(found, gradients)


# Rows


@pytest.mark.parametrize("kind", ["objects", "parquet", "features"])
def test_rows_are_the_same_however_they_are_written(bert: Siblings, tmp_path: Path, kind: str) -> None:
    rows = bert.rows()
    file = tmp_path / "rows.parquet"
    if kind == "objects":
        split = [
            [{"text": t, "answer_start": s} for t, s in zip(*row["answers"].values(), strict=True)] for row in rows
        ]
        file = write_objects(
            tmp_path / "rows.jsonl", [{**row, "answers": one} for row, one in zip(rows, split, strict=True)]
        )
    elif kind == "parquet":
        half = len(rows) // 2  # two row groups
        write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=half)
    else:
        answers = {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int32")),
        }
        features = datasets.Features(
            {"question": datasets.Value("string"), "context": datasets.Value("string"), "answers": answers}
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    loaded = bert.loaded()
    found, expected = (examples_of(loaded, spec_of(path)) for path in (file, bert.file()))
    assert [(e.encoding, e.label, e.passage) for e in found] == [(e.encoding, e.label, e.passage) for e in expected]


def test_columns_may_have_other_names(bert: Siblings, tmp_path: Path) -> None:
    rows = [{"q": row["question"], "c": row["context"], "a": row["answers"]} for row in bert.rows()]
    spec = spec_of(write_objects(tmp_path / "rows.jsonl", rows), question="q", context="c", answers="a")
    loaded = bert.loaded()
    expected = examples_of(loaded, bert.spec())
    assert [(e.encoding, e.label) for e in examples_of(loaded, spec)] == [(e.encoding, e.label) for e in expected]


@pytest.mark.parametrize("stride", [None, 7])
def test_a_long_context_is_read_in_windows_that_overlap(bert: Siblings, tmp_path: Path, stride: int | None) -> None:
    loaded = bert.loaded()
    context = " ".join([*["one"] * 60, "ten"])
    answers = {"text": ["ten"], "answer_start": [len(context) - 3]}
    rows = [{"question": "two three", "context": context, "answers": answers}, GOOD]
    spec = spec_of(write_objects(tmp_path / "rows.jsonl", rows), doc_stride=stride)
    long, short = examples_of(loaded, spec)
    windows = windows_of(loaded.tokenizer, rows[0], loaded.max_length, stride)
    assert [one["input_ids"] for one in long.inputs] == [one["input_ids"] for one in windows]
    assert [len(one["input_ids"]) for one in long.inputs[:-1]] == [loaded.max_length] * (len(windows) - 1)
    assert long.labels == tuple(token for window in windows for token in wanted_tokens(window, rows[0]))
    assert set(long.labels[:2]) == {0}
    assert 0 not in long.labels[-2:]
    assert long.passage is not None
    assert long.passage.answers == ("ten",)
    assert not short.others


def test_windows_that_would_never_end_are_refused_by_line_and_windows_of_other_rows_by_name(
    bert: Siblings, tmp_path: Path
) -> None:
    row = {"question": "two three", "context": " ".join(["one"] * 60), "answers": {"text": [], "answer_start": []}}
    spec = spec_of(write_objects(tmp_path / "rows.jsonl", [GOOD, row]), doc_stride=50)
    with pytest.raises(InvalidDataset, match=r"line 2: a window has 43 tokens .* doc_stride 50 never ends"):
        examples_of(bert.loaded(), spec)
    of_texts = DatasetSpec(source="rows", doc_stride=50)
    found = dict(column_problems(of_texts, Classification(2, {})))
    assert found == {"doc_stride": f"a {Classification(2, {}).title} reads no windows; leave it out"}


GOOD = {"question": "one", "context": "two three", "answers": {"text": ["three"], "answer_start": [4]}}
REFUSED: dict[str, tuple[Row, list[str]]] = {
    "no question": ({**GOOD, "question": None}, ["column 'question' is not text"]),
    "no context": ({"question": "one", "answers": GOOD["answers"]}, ["no column 'context'"]),
    "an empty context": ({**GOOD, "context": "", "answers": {"text": [], "answer_start": []}}, ["is of the context"]),
    "no answers": ({**GOOD, "answers": None}, ["the answers are NoneType"]),
    "a text as answers": ({**GOOD, "answers": "three"}, ["the answers are str"]),
    "lists of other lengths": ({**GOOD, "answers": {"text": ["three"], "answer_start": []}}, ["of the same length"]),
    "no places": ({**GOOD, "answers": {"text": ["three"]}}, ["of the same length"]),
    "a place that is text": ({**GOOD, "answers": {"text": ["three"], "answer_start": ["4"]}}, ["an answer is no text"]),
    "a place before the first": (
        {**GOOD, "answers": {"text": ["three"], "answer_start": [-1]}}, ["an answer is no text"],
    ),
    "another place": (
        {**GOOD, "answers": {"text": ["three"], "answer_start": [3]}}, ["an answer is not at character 3"],
    ),
    "an empty answer": ({**GOOD, "answers": {"text": [""], "answer_start": [0]}}, ["an answer is empty"]),
    "a context of too many windows": (
        {"question": "one", "context": "one " * 30_000, "answers": {"text": [], "answer_start": []}},
        ["windows of its context; 1000 are allowed"],
    ),
    "a long question": ({**GOOD, "question": " ".join(WORDS)}, ["its question has 95 tokens", "no room"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_are_none_are_refused_by_line(bert: Siblings, tmp_path: Path, fault: str) -> None:
    row, words = REFUSED[fault]
    loaded, spec = bert.loaded(), spec_of(write_objects(tmp_path / "rows.jsonl", [GOOD, row]))
    with pytest.raises(InvalidDataset) as caught:
        examples_of(loaded, spec)
    assert all(word in caught.value.message for word in ["line 2", *words]), caught.value.message


@pytest.mark.parametrize(
    ("said", "golds"),
    [("The cat!", ["cat"]), ("a cat", ["dog", "the black cat"]), ("", []), ("cat", []), ("the", ["a"]), ("", ["cat"])],
)
def test_answers_are_compared_as_squad_does(said: str, golds: list[str]) -> None:
    wanted = golds or [""]
    assert squad.f1(said, golds) == pytest.approx(max(compute_f1(gold, said) for gold in wanted))
    exact = max(normalize_answer(gold) == normalize_answer(said) for gold in wanted)
    assert squad.exact_match(said, golds) == exact


def test_the_default_draws_labels(bert: Siblings) -> None:
    assert estimator_for("auto", bert.loaded().task, 0) == Estimator("sampled", 0)
