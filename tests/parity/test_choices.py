"""Accuracy of choices, against lm-evaluation-harness on the same rows."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, write_lines
from tests.tiny_families import DECODERS, WORDS, TinyFamily, bytes_of_decoders
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import ROWS_OF_CHOICES, RowFile, sample
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.evaluation.evaluate import predict
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.tasks import next_tokens
from worker.engine.tasks.choices import Choices
from worker.engine.tasks.metrics import Array

CPU = torch.device("cpu")
ROWS = 70  # more than are ranked at once
METRICS = {"choice_accuracy": "acc", "choice_accuracy_normalised": "acc_norm"}
FAMILIES = {
    **{name: DECODERS[name] for name in ("llama", "gemma2", "opt")},
    "llama-bytes": TinyFamily(**{**vars(DECODERS["llama"]), "tokenizer": bytes_of_decoders}),
}


def rows_of_choices(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions whose choices differ in number and length."""
    draw = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (), generator=draw))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw))

    found = []
    for number in range(count):
        choices = [words(1, 4) for _ in range(2 + number % 3)]
        found.append({"text": words(2, 6), "choices": choices, "label": number % len(choices)})
    return found


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(next_tokens.CHUNK_LOGITS, "cpu", 700)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "m"
    return tiny_checkpoint(folder, family=FAMILIES[request.param], seed=3, task="CausalLM")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "m", family=DECODERS["llama"], seed=3, task="CausalLM")


def spec_of(file: Path, metric: Any = "choice_accuracy", **fields: Any) -> EvaluationSpec:
    return EvaluationSpec(source="rows", path=file, choices="choices", label="label", metric=metric, **fields)


def predictions(loaded: LoadedModel, spec: EvaluationSpec) -> Array:
    rows = sample(RowFile(spec, ROWS_OF_CHOICES), spec, None, shuffle=False)
    kind = loaded.kind.evaluated(spec)
    examples = kind.tokenized(rows, spec, loaded.tokenizer, loaded.max_length, None).examples
    return predict(loaded, examples, "float32", silent, spec)


def by_harness(checkpoint: Path, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What the library says of each row, with a space between text and choice, which is its default."""
    file = folder / "harness.jsonl"
    write_lines(file, [json.dumps(row) for row in rows])
    config = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS.values()],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library and those that it needs warn of
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=4, device="cpu")
        known = TaskManager(include_defaults=False)
        task = ConfigurableTask(config=config)
        result = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, log_samples=True, task_manager=known)
    return sorted(result["samples"]["tiny"], key=lambda one: one["doc_id"])


def test_every_row_is_right_where_the_harness_says_so(checkpoint: Path, tmp_path: Path) -> None:
    rows = rows_of_choices(ROWS, seed=1)
    harness = by_harness(checkpoint, rows, tmp_path)
    file = tmp_path / "rows.jsonl"
    write_lines(file, [json.dumps({**row, "text": f"{row['text']} "}) for row in rows])
    loaded = load(inspect_checkpoint(checkpoint, "m"), CPU)
    for metric, name in METRICS.items():
        found = predictions(loaded, spec_of(file, metric))
        assert found[:, 0].tolist() == [sample[name] for sample in harness]
        for row, sample_, (_, margin, count) in zip(rows, harness, found, strict=True):
            scores = [float(response[0]) for response in sample_["filtered_resps"]]
            if name == "acc_norm":
                scores = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            right = scores.pop(row["label"])
            assert margin == pytest.approx(right - max(scores), abs=1e-4)
            assert count == 1


def test_answers_that_differ_in_their_last_token_are_read_once(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    one, two, three, four, *_ = WORDS
    choices = [f"{one} {two}", three, f"{one} {four}", two]
    write_lines(file, [json.dumps({"text": f"{one} ", "choices": choices, "label": 0})])
    loaded = load(inspect_checkpoint(llama, "m"), CPU)
    spec = spec_of(file)
    rows = sample(RowFile(spec, ROWS_OF_CHOICES), spec, None, shuffle=False)
    [example] = loaded.kind.evaluated(spec).tokenized(rows, spec, loaded.tokenizer, 64, None).examples
    assert isinstance(example, Choices)
    assert example.answers == ((0, 2), (1, 3))
    text = len(loaded.tokenizer(one).input_ids)
    assert [sequence.unpadded for sequence in example.sequences] == [text + 1, text]


@pytest.mark.parametrize("metric", METRICS)
def test_a_merge_is_judged_by_choices(llama: Path, tmp_path: Path, metric: str) -> None:
    rows = rows_of_choices(24, seed=2)
    file = tmp_path / "rows.jsonl"
    write_lines(file, [json.dumps({**row, "text": f"{row['text']} "}) for row in rows])
    specs = [model_spec(llama, None, name=name, evaluation=spec_of(file, metric)) for name in ("one", "two")]
    result = Engine().merge(merge_spec(tmp_path / "out", specs, {"name": "average"}, evaluate=True), silent)
    harness = by_harness(llama, rows, tmp_path)
    expected = sum(one[METRICS[metric]] for one in harness) / len(rows)
    assert 0 < expected < 1
    assert result.metrics is not None
    for found in result.metrics.values():
        assert found.examples == len(rows)
        assert found.expert == found.merged == pytest.approx(expected)


def test_auto_searches_by_choices(tmp_path: Path) -> None:
    specs = []
    for seed, name in enumerate(("one", "two"), start=1):
        folder = tiny_checkpoint(tmp_path / name, family=DECODERS["llama"], seed=seed, task="CausalLM")
        file = tmp_path / f"{name}.jsonl"
        write_lines(file, [json.dumps({**row, "text": f"{row['text']} "}) for row in rows_of_choices(40, seed)])
        specs.append(model_spec(folder, None, evaluation=spec_of(file)))
    method = {"name": "auto", "trials": 4, "candidates": [{"name": "average"}, {"name": "linear"}]}
    result = Engine().merge(merge_spec(tmp_path / "out", specs, method, evaluate=True), silent)
    assert result.candidates is not None
    assert result.metrics is not None
    [chosen] = [candidate for candidate in result.candidates if candidate.chosen]
    for name, metric in result.metrics.items():
        assert chosen.metrics[name].value == metric.merged
        [expert] = [candidate for candidate in result.candidates if candidate.name == f"expert {name}"]
        assert expert.metrics[name].value == metric.expert


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither the place": ({"label": "purple"}, "line 2: the label is neither the place of a choice, from 0, nor"),
    "none": ({"label": None}, "line 2: the label is neither"),
    "out of range": ({"label": 2}, "line 2: label 2 is out of range: the choices are 0 to 1"),
    "below": ({"label": -1}, "line 2: label -1 is out of range"),
    "equal texts": ({"choices": ["one", "one"], "label": "one"}, "line 2: two of its choices are 'one'"),
    "one choice": ({"choices": ["one"]}, "line 2: column 'choices' is no list of two or more texts"),
    "a text": ({"choices": "one"}, "line 2: column 'choices' is no list"),
    "a number": ({"choices": ["one", 2]}, "line 2: column 'choices' is not text"),
    "an empty choice": ({"choices": ["one", ""]}, "line 2: column 'choices' has an empty text"),
    "too long": ({"text": "one " * 60}, r"line 2: the text with choice 0 has \d+ tokens, and 48 are allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_ranked_are_refused_by_name(llama: Path, tmp_path: Path, case: str) -> None:
    changed, message = REFUSED[case]
    good = {"text": "one two ", "choices": ["three", "four five"], "label": 1}
    file = tmp_path / "rows.jsonl"
    write_lines(file, [json.dumps(good), json.dumps({**good, **changed})])
    loaded = load(inspect_checkpoint(llama, "m"), CPU)
    with pytest.raises(InvalidDataset, match=message):
        predictions(loaded, spec_of(file, max_length=48))


@pytest.mark.parametrize("label", [1, 1.0, "1", "four five"])
def test_a_label_is_a_place_or_a_text(tmp_path: Path, label: Any) -> None:
    file = tmp_path / "rows.jsonl"
    write_lines(file, [json.dumps({"text": "one", "choices": ["three", "four five"], "label": label})])
    spec = spec_of(file)
    [row] = sample(RowFile(spec, ROWS_OF_CHOICES), spec, None)
    assert row.label == 1


def test_a_text_that_is_a_choice_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_lines(file, [json.dumps({"text": "one", "choices": ["2", "1"], "label": "1"})])
    spec = spec_of(file)
    [row] = sample(RowFile(spec, ROWS_OF_CHOICES), spec, None)
    assert row.label == 1


def test_choices_are_read_from_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from worker.engine.inputs.tables import read_parquet

    rows = rows_of_choices(5, seed=4)
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    spec = spec_of(file)
    found = read_parquet(spec, ROWS_OF_CHOICES).read(range(5))
    assert [(row.text, row.choices, row.label) for row in found] == [
        (row["text"], tuple(row["choices"]), row["label"]) for row in rows
    ]
