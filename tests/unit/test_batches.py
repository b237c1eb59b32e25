"""From rows to padded batches: tokens, truncation, budgets and padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import POSITIONS, dataset_spec, edit_json, tiny_checkpoint
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.methods import BATCH_TOKENS
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks import Classification, LabelMap
from worker.engine.inputs.examples import (
    BLOCK_ROWS,
    SHORT_ROW,
    Example,
    Tokenized,
    collate,
    padding_values,
    plan_batches,
    tokenize,
)

LABELS = LabelMap(Classification(2, {"no": 0, "yes": 1}))
CPU = torch.device("cpu")
CLS, SEP, ONE, TWO, THREE = 2, 3, 5, 6, 7
PAD = {"input_ids": 9, "attention_mask": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("batches") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def tokenized(tokenizer: Any, *texts: str | tuple[str, str], limit: int = POSITIONS, **columns: Any) -> Tokenized:
    pairs = [text if isinstance(text, tuple) else (text, None) for text in texts]
    rows = [Row(Place("line", 10 + index), first, second, "yes") for index, (first, second) in enumerate(pairs)]
    if any(row.text_pair for row in rows):
        columns["text_pair"] = "pair"
    return tokenize(rows, dataset_spec(Path("rows.jsonl"), **columns), tokenizer, limit, LABELS)


def example(length: int, index: int = 0, label: float | None = None) -> Example:
    return Example(
        index, Place("line", index + 1), {"input_ids": [ONE] * length, "attention_mask": [1] * length}, label
    )


def test_a_row_becomes_its_tokens_its_line_and_its_labels_id(tokenizer: Any) -> None:
    found = tokenized(tokenizer, "one two", "three")
    assert [dict(e.encoding) for e in found.examples] == [
        {"input_ids": [CLS, ONE, TWO, SEP], "token_type_ids": [0] * 4, "attention_mask": [1] * 4},
        {"input_ids": [CLS, THREE, SEP], "token_type_ids": [0] * 3, "attention_mask": [1] * 3},
    ]
    assert [(e.index, e.place.number, e.label, e.length) for e in found.examples] == [(0, 10, 1, 4), (1, 11, 1, 3)]
    assert found.truncated == 0


def test_a_pair_is_one_row_of_two_segments(tokenizer: Any) -> None:
    (found,) = tokenized(tokenizer, ("one two", "three")).examples
    assert found.encoding["input_ids"] == [CLS, ONE, TWO, SEP, THREE, SEP]
    assert found.encoding["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_rows_whose_labels_are_not_read_have_no_label(tokenizer: Any) -> None:
    rows = [Row(Place("line", 1), "one", None, "yes")]
    found = tokenize(rows, dataset_spec(Path("rows.jsonl")), tokenizer, POSITIONS, None)
    assert found.examples[0].label is None


@pytest.mark.parametrize("text", ["", "   ", "one", "\x00", "[SEP] [PAD] [CLS]", "猫"])
def test_every_text_has_at_least_the_special_tokens(tokenizer: Any, text: str) -> None:
    (found,) = tokenized(tokenizer, text).examples
    assert found.encoding["input_ids"][0] == CLS
    assert found.encoding["input_ids"][-1] == SEP


@pytest.mark.parametrize(
    ("columns", "length"),
    [({}, POSITIONS), ({"max_length": 7}, 7), ({"max_length": 2}, 2), ({"max_length": 1000}, POSITIONS)],
    ids=str,
)
def test_longer_rows_are_cut_at_the_models_limit_or_the_data_sets_own(
    tokenizer: Any, columns: dict[str, int], length: int
) -> None:
    texts = ["one " * 100, "one", " ".join(["one"] * (length - 2)), " ".join(["one"] * (length - 1))]
    found = tokenized(tokenizer, *texts, **columns)
    assert [e.length for e in found.examples] == [length, min(3, length), length, length]
    assert found.examples[0].encoding["input_ids"] == [CLS, *[ONE] * (length - 2), SEP]
    assert found.truncated == sum(len(text.split()) + 2 > length for text in texts)


def test_a_long_pair_is_cut_where_it_is_longer(tokenizer: Any) -> None:
    found = tokenized(tokenizer, ("one two", "three " * 500), ("three " * 500, "one two"))
    assert [e.length for e in found.examples] == [POSITIONS, POSITIONS]
    assert [e.encoding["input_ids"].count(ONE) for e in found.examples] == [1, 1]
    assert found.truncated == 2


def test_a_limit_without_room_for_a_pairs_special_tokens_is_refused_by_name(tokenizer: Any) -> None:
    """Tokenizers do not cut at all then, and rows of any length would reach the model."""
    assert tokenized(tokenizer, ("one two", "three"), max_length=3).examples[0].length == 3
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl.*max_length"):
        tokenized(tokenizer, ("one two", "three"), max_length=2)


def test_settings_stored_with_a_tokenizer_neither_cut_nor_pad(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(
        tmp_path / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        },
    )  # fmt: skip
    found = tokenized(AutoTokenizer.from_pretrained(tmp_path), "one two three one two", "one")
    assert [e.length for e in found.examples] == [7, 3]
    assert found.truncated == 0


def test_a_tokenizer_without_segments_gives_none(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    plain = AutoTokenizer.from_pretrained(tmp_path)
    found = tokenized(plain, "one two", "three")
    (batch,) = collate([found.examples], padding_values(plain), CPU)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs["input_ids"].tolist() == [[CLS, ONE, TWO, SEP], [CLS, THREE, SEP, 0]]


def test_a_row_without_tokens_is_refused_with_its_line() -> None:
    bare = Tokenizer(WordLevel({"one": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = Whitespace()
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 11: no tokens"):
        tokenized(PreTrainedTokenizerFast(tokenizer_object=bare), "one", " ")


def test_an_unknown_label_is_refused_with_its_line(tokenizer: Any) -> None:
    rows = [Row(Place("line", 1), "one", None, "yes"), Row(Place("line", 5), "two", None, "perhaps")]
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 5: label 'perhaps' is unknown"):
        tokenize(rows, dataset_spec(Path("rows.jsonl")), tokenizer, POSITIONS, LABELS)


def random_examples(count: int, longest: int = 200) -> list[Example]:
    lengths = torch.randint(2, longest, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    return [example(length, index) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("count", [0, 1, 2, 127, 1024, 1025, 2500])
@pytest.mark.parametrize("tokens", [BATCH_TOKENS, 300, 1])
def test_every_row_is_in_one_batch_and_no_batch_is_over_budget(count: int, tokens: int) -> None:
    examples = random_examples(count)
    batches = plan_batches(examples, tokens)
    assert sorted(e.index for batch in batches for e in batch) == list(range(count))
    for batch in batches:
        assert 1 <= len(batch) <= max(1, tokens // SHORT_ROW)
        assert len(batch) * max(e.length for e in batch) <= tokens or len(batch) == 1


def test_rows_are_sorted_by_length_within_blocks_of_the_given_order_only() -> None:
    batches = plan_batches(random_examples(3 * BLOCK_ROWS - 5))
    order = [e for batch in batches for e in batch]
    for start in range(0, len(order), BLOCK_ROWS):
        block = order[start : start + BLOCK_ROWS]
        assert sorted(e.index for e in block) == list(range(start, start + len(block)))
        assert [e.length for e in block] == sorted(e.length for e in block)


def test_batches_are_full() -> None:
    long, short = ([example(length, index) for index in range(10)] for length in (2 * SHORT_ROW, SHORT_ROW // 4))
    assert [len(batch) for batch in plan_batches(long, tokens=6 * SHORT_ROW)] == [3, 3, 3, 1]
    assert [len(batch) for batch in plan_batches(short, tokens=4 * SHORT_ROW)] == [4, 4, 2]


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    lengths = [[e.length for e in batch] for batch in plan_batches([example(50), example(2), example(60)], tokens=10)]
    assert lengths == [[2], [50], [60]]


def test_rows_are_padded_at_their_end_to_the_longest_of_their_batch(tokenizer: Any) -> None:
    examples = tokenized(tokenizer, "one two three", "three", "two").examples
    pad = padding_values(tokenizer)
    of_decoders = {"decoder_input_ids": 0, "decoder_attention_mask": 0}
    assert pad == {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0, **of_decoders}
    first, second = collate([examples[:2], examples[2:]], pad, CPU)
    assert first.inputs["input_ids"].tolist() == [[CLS, ONE, TWO, THREE, SEP], [CLS, THREE, SEP, 0, 0]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert second.inputs["input_ids"].tolist() == [[CLS, TWO, SEP]]
    assert {tensor.dtype for tensor in first.inputs.values()} == {torch.int64}
    assert [place.number for place in first.places] == [10, 11]
    assert (len(first), first.indices.tolist()) == (2, [0, 1])
    assert second.indices.tolist() == [2]


def test_each_input_is_padded_with_its_own_value() -> None:
    (batch,) = collate([[example(3), example(1)]], PAD, CPU)
    assert batch.inputs["input_ids"].tolist() == [[ONE, ONE, ONE], [ONE, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "dtype"), [((1, 0), torch.int64), ((0.5, 1.0), torch.float32), ((None, None), None)], ids=str
)
def test_labels_are_ids_or_numbers_or_absent(labels: tuple[Any, ...], dtype: torch.dtype | None) -> None:
    (batch,) = collate([[example(2, 0, labels[0]), example(2, 1, labels[1])]], PAD, CPU)
    if dtype is None:
        assert batch.labels is None
    else:
        assert batch.labels is not None
        assert batch.labels.dtype == dtype
        assert batch.labels.tolist() == list(labels)
