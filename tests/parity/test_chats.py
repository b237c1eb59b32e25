"""Rows of conversations: the tokenizer's template writes them, and what the assistant says is predicted."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import merge_spec, model_spec, silent, tiny_checkpoint, write_lines
from tests.tiny_families import DECODERS, TinyFamily, bytes_of_decoders
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import RowFile, sample
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, column_problems
from worker.engine.inputs.chats import template_version
from worker.engine.inputs.examples import Example
from worker.engine.inputs.tables import read_parquet
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import LoadedModel, load
from worker.engine.runtime import rendering

CPU = torch.device("cpu")
READER = CausalLanguageModel.rows
WRITTEN = "{{ '<s>' + message['content'] + '</s>' }}"
BEGINNING = "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
PLAIN = "{% for message in messages %}" + WRITTEN + "{% endfor %}" + BEGINNING
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<s>' }}"
    "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}"
    "{% else %}" + WRITTEN + "{% endif %}{% endfor %}" + BEGINNING
)
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
    "" + WRITTEN + "{% endif %}{% endfor %}" + BEGINNING
)
STRICT = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DATED = "{{ strftime_now('%d %B') }}" + PLAIN
TALKS = [
    [("user", "one two"), ("assistant", "three")],
    [("system", "four"), ("user", "five"), ("assistant", "six seven"), ("user", "eight"), ("assistant", "nine")],
    [("user", "w1 w2 w3"), ("assistant", "w4"), ("user", "left open")],
]


def talk(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.fixture(scope="module", params=["words", "bytes"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = DECODERS["llama"]
    family = tiny if request.param == "words" else TinyFamily(**{**vars(tiny), "tokenizer": bytes_of_decoders})
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "m", family=family, seed=3, task="CausalLM")


def with_template(checkpoint: Path, template: str | None) -> LoadedModel:
    file = checkpoint / "chat_template.jinja"
    file.unlink(missing_ok=True)
    if template is not None:
        file.write_text(template)
    return load(inspect_checkpoint(checkpoint, "m"), CPU)


def spec_of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> DatasetSpec:
    write_lines(folder / "rows.jsonl", [json.dumps(row) for row in rows])
    return DatasetSpec(source="rows", path=folder / "rows.jsonl", messages="messages", **fields)


def examples_of(loaded: LoadedModel, spec: DatasetSpec) -> list[Example]:
    rows = sample(RowFile(spec, READER), spec, None, shuffle=False)
    return loaded.kind.tokenized(rows, spec, loaded.tokenizer, loaded.max_length, None).examples


def predicted(example: Example) -> list[int]:
    """Places of the tokens that are predicted."""
    assert example.positions is not None
    tokens = example.encoding["input_ids"]
    assert list(example.labels) == [tokens[place + 1] for place in example.positions]
    return [place + 1 for place in example.positions]


def test_what_the_template_marks_is_what_transformers_says(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, MARKED)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for example, messages in zip(
        examples_of(loaded, spec_of(tmp_path, [talk(*one) for one in TALKS])), TALKS, strict=True
    ):
        own = tokenizer.apply_chat_template(
            talk(*messages)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.encoding["input_ids"] == own["input_ids"]
        assert predicted(example) == [place for place, said in enumerate(own["assistant_masks"]) if said]


def test_without_marks_answers_are_what_they_add_to_the_messages_before(checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, [talk(*one) for one in TALKS])
    plain, marked = (examples_of(with_template(checkpoint, template), spec) for template in (PLAIN, MARKED))
    for one, other in zip(plain, marked, strict=True):
        assert one.encoding == other.encoding
        assert predicted(one) == predicted(other)
        assert 0 < len(predicted(one)) < one.length - 1


def test_a_template_that_forgets_is_refused_by_row(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, FORGETFUL)
    examples_of(loaded, spec_of(tmp_path, [talk(*TALKS[0])]))
    message = r"line 2: the chat template writes the messages before number \d otherwise than as a part of all"
    with pytest.raises(InvalidDataset, match=message):
        examples_of(loaded, spec_of(tmp_path, [talk(*one) for one in TALKS[:2]]))


def test_a_template_that_fails_on_a_row_is_refused_by_row_without_its_text(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, STRICT)
    spec = spec_of(tmp_path, [talk(*TALKS[1]), talk(*TALKS[0])])
    with pytest.raises(InvalidDataset, match=r"line 2: the chat template fails on it \(TemplateError\)"):
        examples_of(loaded, spec)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 9 ** (messages|length * 99999999) }}", "the chat template takes more than 1 s for it"),
        ("{{ ('x' * 9999999999)|length }}", "the chat template takes more than 1024 MiB of memory for it"),
        ("{{ 'x' * 10000001 }}", r"the chat template writes 100000\d\d characters of it; 10000000 are allowed"),
        ("x{{ '\\ud83d' }}", r"the chat template writes half of a character \(a lone surrogate, '\\ud83d'\)"),
    ],
    ids=["time", "memory", "length", "surrogate"],
)
def test_what_a_template_may_not_do_is_refused_by_row(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, problem: str
) -> None:
    monkeypatch.setattr(rendering, "LONGEST_S", 1)
    loaded = with_template(checkpoint, f"{{% if messages|length > 2 %}}{template}{{% endif %}}{PLAIN}")
    with pytest.raises(InvalidDataset, match=f"line 2: {problem}"):
        examples_of(loaded, spec_of(tmp_path, [talk(*TALKS[0]), talk(*TALKS[1])]))


def test_templates_run_in_the_sandbox(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidDataset, match=r"line 1: the chat template fails on it \(SecurityError\)"):
        examples_of(loaded, spec_of(tmp_path, [talk(*TALKS[0])]))


def test_a_tokenizer_without_a_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, None)
    with pytest.raises(InvalidDataset, match="need a chat template, and the checkpoint's tokenizer has none"):
        examples_of(loaded, spec_of(tmp_path, [talk(*TALKS[0])]))


REFUSED: dict[str, tuple[Any, str]] = {
    "text": ("hello", "line 2: column 'messages' is no list of messages"),
    "nothing": ([], "line 2: column 'messages' is no list of messages"),
    "texts": (["hello"], "line 2: column 'messages' has a message without role"),
    "no content": (
        [{"role": "assistant"}],
        "line 2: column 'messages' has a message without role",
    ),
    "a tool": (
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        "line 2: column 'messages' has 'tool_calls' in message 0, which is not read",
    ),
    "a picture": ([{"role": "assistant", "content": [{}]}], "line 2: column 'messages' is not text"),
    "no answer": (
        [{"role": "user", "content": "x"}],
        "line 2: column 'messages' has no message of the role",
    ),
    "an answer to nothing": ([{"role": "assistant", "content": "x"}], "line 2: its first message is the assistant's"),
    "too long": (
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "one two three " * 30}],
        "line 2: it is longer than the 48 tokens that are allowed, and what is to be predicted would be cut",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_no_conversations_are_refused_by_name(checkpoint: Path, tmp_path: Path, case: str) -> None:
    messages, problem = REFUSED[case]
    loaded = with_template(checkpoint, PLAIN)
    spec = spec_of(tmp_path, [talk(*TALKS[0]), {"messages": messages}], max_length=48)
    with pytest.raises(InvalidDataset, match=problem):
        examples_of(loaded, spec)


def test_keys_without_a_value_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, PLAIN)
    [messages] = [talk(*TALKS[0])["messages"]]
    more = [{**message, "tool_calls": None} for message in messages]
    one, other = examples_of(loaded, spec_of(tmp_path, [{"messages": messages}, {"messages": more}]))
    assert one.encoding == other.encoding


def test_a_completion_that_would_be_cut_is_refused_by_row(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"text": "one ", "target": "two"}, {"text": "one ", "target": "two three " * 20}]
    write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    spec = DatasetSpec(source="rows", path=tmp_path / "rows.jsonl", target="target", max_length=12)
    with pytest.raises(InvalidDataset, match="line 2: it is longer than the 12 tokens that are allowed"):
        examples_of(with_template(checkpoint, None), spec)


def test_plain_text_is_cut(checkpoint: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [json.dumps({"text": "one two three " * 30})])
    spec = DatasetSpec(source="rows", path=tmp_path / "rows.jsonl", max_length=12)
    [example] = examples_of(with_template(checkpoint, None), spec)
    assert example.length == 12


@pytest.mark.parametrize("column", ["text", "target"])
def test_other_columns_beside_conversations_are_refused(column: str) -> None:
    spec = DatasetSpec(source="rows", messages="messages", **{column: "x"})
    task = CausalLanguageModel(9, {})
    assert list(column_problems(spec, task)) == [(column, "a causal language model does not read it; leave it out")]


def test_conversations_are_read_from_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([talk(*one) for one in TALKS])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    spec = DatasetSpec(source="rows", path=tmp_path / "rows.parquet", messages="messages")
    found = read_parquet(spec, READER).read(range(len(TALKS)))
    assert [row.messages for row in found] == [tuple(one) for one in TALKS]


def test_a_merge_is_measured_and_judged_on_conversations(checkpoint: Path, tmp_path: Path) -> None:
    with_template(checkpoint, DATED)
    spec = spec_of(tmp_path, [talk(*one) for one in TALKS] * 3)
    shared = {**spec.model_dump(), "source": "rows"}
    specs = [
        model_spec(checkpoint, None, name=name, dataset=spec, evaluation=EvaluationSpec(**shared, metric="perplexity"))
        for name in ("one", "two")
    ]
    result = Engine().merge(merge_spec(tmp_path / "out", specs, evaluate=True), silent)
    assert result.metrics is not None
    assert result.metrics["one"].expert == pytest.approx(result.metrics["one"].merged)
    assert [model.examples for model in result.models] == [len(TALKS) * 3] * 2
    doubt = f"the chat template of local:{checkpoint.name} reads the date: rows of rows are other texts tomorrow"
    assert result.notes[0] == doubt


def test_what_depends_on_the_template_is_kept_under_it(checkpoint: Path) -> None:
    spec = DatasetSpec(source="rows", messages="messages")
    plain, marked, dated = (
        template_version(with_template(checkpoint, template).tokenizer, spec) for template in (PLAIN, MARKED, DATED)
    )
    assert plain != marked
    assert "day" not in plain
    assert dated["day"] == date.today().isoformat()


def test_the_last_answer_is_what_should_be_written(checkpoint: Path, tmp_path: Path) -> None:
    loaded = with_template(checkpoint, PLAIN)
    rows = [talk(*TALKS[0]), talk(*TALKS[1])]
    spec = EvaluationSpec(**spec_of(tmp_path, rows).model_dump(), metric="exact_match", max_new_tokens=4)
    kind: Any = loaded.kind.evaluated(spec)
    read = sample(RowFile(spec, CausalLanguageModel.reader("exact_match")), spec, None, shuffle=False)
    prompts = kind.tokenized(read, spec, loaded.tokenizer, loaded.max_length, None).examples
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for prompt, messages in zip(prompts, TALKS[:2], strict=True):
        assert prompt.target == messages[-1][1]
        own = tokenizer.apply_chat_template(
            talk(*messages[:-1])["messages"], add_generation_prompt=True, return_dict=True
        )
        assert prompt.encoding["input_ids"] == own["input_ids"]
    open_ended = EvaluationSpec(**spec_of(tmp_path, [talk(*TALKS[2])]).model_dump(), metric="exact_match")
    [row] = sample(RowFile(open_ended, CausalLanguageModel.reader("exact_match")), open_ended, None)
    with pytest.raises(InvalidDataset, match="line 1: its last message is not the assistant's answer to others"):
        kind.tokenized([row], open_ended, loaded.tokenizer, loaded.max_length, None)
