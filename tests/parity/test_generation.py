"""What language models write: against transformers' own generation, a row at a time."""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, tiny_texts, write_lines
from tests.tiny_families import DECODERS, WORDS, TinyFamily
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.catalog.data.rows import Row, RowFile, sample
from worker.engine.catalog.planning.memory import HELD_TOKENS
from worker.engine.catalog.primitives.answers import answer_in, answer_pattern
from worker.engine.catalog.primitives.errors import InvalidDataset, NumericalError, Place
from worker.engine.catalog.tasks import CausalLanguageModel, column_problems
from worker.engine.evaluation.evaluate import predict
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.tasks import generation
from worker.engine.tasks.metrics import Array

CPU = torch.device("cpu")
ROWS = 24
NEW = 8
ENDS = [1, *range(10, 40)]  # so many that rows end after different numbers of tokens


def ending(folder: Path, family: TinyFamily, seed: int = 5) -> Path:
    tiny_checkpoint(folder, family=family, seed=seed, base_seed=1000 + seed, task="CausalLM")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return folder


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose rows end at different places."""
    root = tmp_path_factory.mktemp(request.param)
    made = (ending(root / str(seed), DECODERS[request.param], seed) for seed in range(5, 50))
    return next(folder for folder in made if len({tokens for _, tokens in written_alone(folder)}) > 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ending(tmp_path_factory.mktemp("llama") / "m", DECODERS["llama"])


def texts() -> list[str]:
    """Texts of two to five words: a tokenizer may need several tokens for one."""
    return [" ".join(text.split()[: 2 + place % 4]) for place, text in enumerate(tiny_texts(ROWS, 3))]


def spec_of(file: Path, **settings: Any) -> EvaluationSpec:
    settings = {"max_new_tokens": NEW, **settings}
    return EvaluationSpec(source="rows", path=file, target="target", metric="exact_match", **settings)


def rows_with(targets: list[str], file: Path) -> None:
    rows = [{"text": text, "target": target} for text, target in zip(texts(), targets, strict=True)]
    write_lines(file, [json.dumps(row) for row in rows])


def predictions(loaded: LoadedModel, spec: EvaluationSpec) -> Array:
    reader = CausalLanguageModel.reader("exact_match")
    return predictions_of(loaded, spec, sample(RowFile(spec, reader), spec, None, shuffle=False))


def predictions_of(loaded: LoadedModel, spec: EvaluationSpec, rows: list[Row]) -> Array:
    examples = loaded.kind.evaluated(spec).tokenized(rows, spec, loaded.tokenizer, loaded.max_length, None).examples
    return predict(loaded, examples, "float32", silent, spec)


@cache
def written_alone(checkpoint: Path) -> list[tuple[str, int]]:
    """By transformers, a row at a time: the text and the number of its tokens, without an end token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = []
    for text in texts():
        inputs = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=3)[0]
        own = tokens[inputs["input_ids"].shape[1] :].tolist()
        found.append((tokenizer.decode(own, skip_special_tokens=True), len([t for t in own if t not in ENDS])))
        if own[-1] in ENDS:
            found[-1] = (tokenizer.decode(own[:-1], skip_special_tokens=True), len(own) - 1)
    return found


def test_rows_together_are_written_as_each_alone(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "HELD_TOKENS", 60)  # so that there are several batches
    assert_written_as_alone(decoder)


def test_rows_are_written_in_one_batch_too(checkpoint: Path) -> None:
    assert sum(len(text.split()) + NEW for text in texts()) < HELD_TOKENS
    assert_written_as_alone(checkpoint)


def assert_written_as_alone(checkpoint: Path) -> None:
    alone = written_alone(checkpoint)
    loaded, spec = load(inspect_checkpoint(checkpoint, "m"), CPU), spec_of(Path("rows.jsonl"))
    rows = [
        Row(Place("row", number), text, None, None, target)  # bytes that no file may hold may be among what is written
        for number, (text, (target, _)) in enumerate(zip(texts(), alone, strict=True), start=1)
    ]
    found = predictions_of(loaded, spec, rows)
    assert found[:, :3].tolist() == [[1, tokens, 1] for _, tokens in alone]
    assert np.isnan(found[:, 3]).all()  # no pattern says what an answer is


def test_other_targets_are_wrong(checkpoint: Path, tmp_path: Path) -> None:
    alone = written_alone(checkpoint)
    rows_with([f"{text} one" if place % 2 else text for place, (text, _) in enumerate(alone)], tmp_path / "rows.jsonl")
    found = predictions(load(inspect_checkpoint(checkpoint, "m"), CPU), spec_of(tmp_path / "rows.jsonl"))
    assert found[:, 0].tolist() == [1, 0] * (ROWS // 2)


def test_penalties_of_the_checkpoint_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    rows_with([text for text, _ in written_alone(checkpoint)], tmp_path / "rows.jsonl")
    loaded = load(inspect_checkpoint(checkpoint, "m"), CPU)
    expected = predictions(loaded, spec_of(tmp_path / "rows.jsonl"))
    model: Any = loaded.model
    model.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0)
    found = predictions(loaded, spec_of(tmp_path / "rows.jsonl"))
    assert found[:, :3].tolist() == expected[:, :3].tolist()
    assert model.generation_config.temperature == 9.0  # it has its own again


def test_a_text_ends_at_the_first_stop(checkpoint: Path, tmp_path: Path) -> None:
    alone = written_alone(checkpoint)
    words = [text.split() for text, _ in alone]

    def cut(of_row: list[str], stop: str) -> tuple[str, int]:
        place = next((index for index, word in enumerate(of_row) if stop in word), None)
        return (" ".join(of_row), len(of_row)) if place is None else (" ".join(of_row[:place]), place + 1)

    stop = max(WORDS, key=lambda word: sum(cut(of_row, word)[1] < len(of_row) for of_row in words))
    cuts = [cut(of_row, stop) for of_row in words]
    assert any(tokens < len(of_row) for (_, tokens), of_row in zip(cuts, words, strict=True))
    rows_with([text for text, _ in cuts], tmp_path / "rows.jsonl")
    spec = spec_of(tmp_path / "rows.jsonl", stop=["never written", stop])
    found = predictions(load(inspect_checkpoint(checkpoint, "m"), CPU), spec)
    for (right, tokens, *_), (_, least), (_, uncut), of_row in zip(found, cuts, alone, words, strict=True):
        assert right == 1
        assert least <= tokens <= uncut if least < len(of_row) else tokens == uncut  # special tokens are no words


def test_a_merge_is_judged_by_what_it_writes_and_by_how_much(checkpoint: Path, tmp_path: Path) -> None:
    alone = written_alone(checkpoint)
    rows_with([text if place % 3 else "other" for place, (text, _) in enumerate(alone)], tmp_path / "rows.jsonl")
    done: list[tuple[str, int]] = []
    specs = [
        model_spec(checkpoint, None, name=name, evaluation=spec_of(tmp_path / "rows.jsonl")) for name in ("one", "two")
    ]
    result = Engine().merge(
        merge_spec(tmp_path / "out", specs, {"name": "average"}, evaluate=True),
        lambda phase, count, *_: done.append((phase, count)),
    )
    assert result.metrics is not None
    length = sum(tokens for _, tokens in alone) / ROWS
    for found in result.metrics.values():
        assert found.expert == found.merged == pytest.approx(2 / 3)
        assert found.answer_tokens is not None
        assert found.answer_tokens["expert"] == found.answer_tokens["merged"] == pytest.approx(length)
    assert max(count for phase, count in done if phase == "evaluating") == 2 * (3 + 1) * ROWS  # the other expert too


def test_auto_searches_by_what_is_written(tmp_path: Path) -> None:
    specs = []
    for seed, name in enumerate(("base", "one", "two")):
        folder = tiny_checkpoint(tmp_path / name, family=DECODERS["llama"], seed=seed, task="CausalLM")
        if name == "base":
            continue
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = []
        for text in tiny_texts(ROWS, seed):
            inputs = tokenizer(text, return_tensors="pt")
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=2)[0, inputs["input_ids"].shape[1] :]
            rows.append({"text": text, "target": tokenizer.decode(tokens, skip_special_tokens=True)})
        file = tmp_path / f"{name}.jsonl"
        write_lines(file, [json.dumps(row) for row in rows])
        specs.append(model_spec(folder, None, evaluation=spec_of(file, max_new_tokens=2, answer=r"\S+")))
    method = {"name": "auto", "trials": 3, "candidates": [{"name": "average"}], "must_beat": ["base", "best_expert"]}
    method |= {"must_keep_length": [0.5, 0.75], "must_fit": 0.5}
    spec = merge_spec(tmp_path / "out", specs, method, evaluate=True)
    base = CheckpointSpec(source="base", path=tmp_path / "base")
    result = Engine().merge(spec.model_copy(update={"base": base}), silent)
    assert result.candidates is not None
    assert result.metrics is not None
    for name, metric in result.metrics.items():
        assert metric.expert == 1
        lines = {line.kind: line for line in result.candidates if line.name in (f"expert {name}", "base", "average")}
        assert lines["expert"].metrics[name].value == 1
        assert lines["base"].metrics[name].value == metric.base
        assert metric.answer_tokens is not None
        written = {kind: line.metrics[name].answer_tokens for kind, line in lines.items()}
        told = metric.answer_tokens
        assert written == {"expert": told["expert"], "base": told["base"], "method": told["merged"]}
    [chosen] = [line for line in result.candidates if line.chosen]
    means = {line.name: line.mean_retention for line in result.candidates if line.kind in ("expert", "base")}
    unbeaten = [name for name, mean in means.items() if (mean or 0) >= (chosen.mean_retention or 0)]
    assert result.accepted is False
    assert unbeaten
    for name, metric in result.metrics.items():
        assert metric.answers_fit is not None
        assert metric.answers_fit["expert"] == 1
        assert metric.answers_fit["merged"] >= 0.5
        assert f"on the rows of {name}" in result.notes[0]
    assert "it writes 2.0 tokens, and the expert 2.0, not 0.5 to 0.75 times as many" in result.notes[0]
    assert "fit the pattern" not in result.notes[0]
    assert all(name in result.notes[0] for name in unbeaten)
    assert "one, tokens written" in (tmp_path / "out" / "README.md").read_text()


def test_a_row_without_room_for_the_answer_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": text, "target": "one"}) for text in ("one", "one " * 43)])
    loaded = load(inspect_checkpoint(checkpoint, "m"), CPU)
    message = r"line 2: its \d+ tokens leave no room for 8 more, since 48 are allowed; set a smaller max_new_tokens"
    with pytest.raises(InvalidDataset, match=message):
        predictions(loaded, spec_of(tmp_path / "rows.jsonl", max_length=48))


def test_logits_that_are_not_finite_are_an_error_that_names_the_row(checkpoint: Path, tmp_path: Path) -> None:
    rows_with(["one"] * ROWS, tmp_path / "rows.jsonl")
    loaded = load(inspect_checkpoint(checkpoint, "m"), CPU)
    model: Any = loaded.model
    model.get_output_embeddings().weight.fill_(float("nan"))
    spec = spec_of(tmp_path / "rows.jsonl")
    with pytest.raises(NumericalError, match=r"m gives .* NaN or infinite on line \d+ of rows") as caught:
        predictions(loaded, spec)
    assert 1 <= int(str(caught.value.detail["line"])) <= ROWS


SETTINGS = {"stop": ["one"], "max_new_tokens": 5, "answer": "one"}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("metric", ["perplexity", "choice_accuracy"])
def test_settings_of_what_is_written_are_refused_for_other_metrics(setting: str, metric: Any) -> None:
    columns = {"choices": "choices", "label": "label"} if metric == "choice_accuracy" else {}
    spec = EvaluationSpec(source="rows", metric=metric, **columns, **{setting: SETTINGS[setting]})
    problem = f"metric {metric} does not judge what a model writes; leave it out"
    assert list(column_problems(spec, CausalLanguageModel(9, {}), True, metric)) == [(setting, problem)]


def test_the_target_is_read_under_its_own_name_by_default() -> None:
    spec = EvaluationSpec(source="rows", metric="exact_match")
    assert list(column_problems(spec, CausalLanguageModel(9, {}), True, "exact_match")) == []
    assert CausalLanguageModel.reader("exact_match").columns(spec) == {"text": "text", "target": "target"}


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 12 \n", None, "12"),
        ("so it is\n#### 1,200", r"#### (-?[0-9,]+)", "1,200"),
        ("3 and 4", r"\d", "3"),
        ("3 and 4", r"(?s).*(\d)", "4"),
        ("none", r"\d", None),
        ("x", r"x(y)?", None),
    ],
)
def test_an_answer_is_the_first_match_or_its_group(text: str, pattern: str | None, answer: str | None) -> None:
    assert answer_in(text, None if pattern is None else answer_pattern(pattern)) == answer


def test_a_target_is_read_by_the_pattern_where_it_matches(checkpoint: Path, tmp_path: Path) -> None:
    alone = written_alone(checkpoint)
    pattern = r"^\S+"
    rows_with([f"{(text.split() or ['none'])[0]} and more" for text, _ in alone], tmp_path / "rows.jsonl")
    loaded = load(inspect_checkpoint(checkpoint, "m"), CPU)
    found = predictions(loaded, spec_of(tmp_path / "rows.jsonl", answer=pattern))
    assert found[:, 0].tolist() == found[:, 3].tolist() == [float(bool(text.split())) for text, _ in alone]


def test_patterns_take_linear_time() -> None:
    start = time.perf_counter()
    assert answer_in("a" * 100_000, answer_pattern("(a*)*(a*)*b")) is None
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("pattern", ["(", r"(a)\1", "((a{1000}){1000}){1000}", "(?=a)"])
def test_patterns_that_cannot_be_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="no pattern of RE2"):
        spec_of(Path("rows.jsonl"), answer=pattern)
