"""Turns rows into padded batches of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.engine.catalog.contracts.spec import DatasetSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.methods import BATCH_TOKENS
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks import Label, LabelMap
from worker.engine.runtime.resources import is_out_of_memory

BLOCK_ROWS = 1024  # rows are sorted by length within blocks only, so that a prefix of the blocks is a fair sample
SHORT_ROW = 16  # tokens; a batch has at most as many rows as rows of this length fit into it


@dataclass(frozen=True)
class Example:
    """One tokenised row. `index` is its place in the data set's seeded order."""

    index: int
    place: Place
    encoding: Mapping[str, list[int]]
    label: Label | None

    @property
    def length(self) -> int:
        return len(self.encoding["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Padded tensors on the device: inputs, each (batch, tokens), and labels, (batch,) or (batch, labels), if any."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    indices: Tensor
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Tokenized:
    examples: list[Example]
    truncated: int
    """Number of rows that were longer than the limit and were cut."""


def tokenize(
    rows: Sequence[Row],
    spec: DatasetSpec,
    tokenizer: Any,
    max_length: int,
    labels: LabelMap | None,
    first: int = 0,
) -> Tokenized:
    """Tokenise `rows`, truncating to `max_length` tokens (and to the data set's own limit).

    Labels are read if `labels` is given. `first` is the place of the first row in the data set's seeded order.

    Raises:
        InvalidDataset: a row has no tokens, or a label that the head does not have.
    """
    limit = min(max_length, spec.max_length or max_length)
    special = tokenizer.num_special_tokens_to_add(pair=spec.text_pair is not None)
    if limit < special:  # tokenizers do not cut at all then
        raise InvalidDataset(spec.source, f"max_length {limit} has no room for the {special} special tokens")
    pairs = None if spec.text_pair is None else [row.text_pair for row in rows]
    try:
        encoded = tokenizer(
            [row.text for row in rows], pairs, truncation=True, max_length=limit, padding=False, verbose=False
        )
    except Exception as error:  # tokenizers raise bare exceptions, and their texts may quote a row
        if is_out_of_memory(error):
            raise
        problem = f"the checkpoint's tokenizer fails on it ({type(error).__name__}); does it have its unknown token?"
        raise InvalidDataset(spec.source, problem) from error
    names = [name for name in encoded if name in tokenizer.model_input_names]
    overflowing = sum(encoding.overflowing != [] for encoding in encoded.encodings or ())
    examples = []
    for index, row in enumerate(rows):
        encoding = {name: encoded[name][index] for name in names}
        if not encoding["input_ids"]:
            raise InvalidDataset(spec.source, "no tokens", row.place)
        label = None if labels is None or spec.label is None else labels.value(row.label, spec.source, row.place)
        examples.append(Example(first + index, row.place, encoding, label))
    return Tokenized(examples, overflowing)


def plan_batches(examples: Sequence[Example], tokens: int = BATCH_TOKENS) -> list[list[Example]]:
    """Make batches of rows of similar length within blocks of the given order, each of at most `tokens` padded tokens.

    A row longer than the budget is a batch of its own.
    """
    rows = max(1, tokens // SHORT_ROW)
    batches: list[list[Example]] = []
    for start in range(0, len(examples), BLOCK_ROWS):
        block = sorted(examples[start : start + BLOCK_ROWS], key=lambda example: example.length)
        current: list[Example] = []
        for example in block:  # ascending, so the newest is the longest
            if current and ((len(current) + 1) * example.length > tokens or len(current) == rows):
                batches.append(current)
                current = []
            current.append(example)
        batches.append(current)
    return batches


def collate(batches: Sequence[Sequence[Example]], pad: Mapping[str, int], device: torch.device) -> Iterator[Batch]:
    """Pad each batch to its longest row; `pad` is the padding value of every model input."""
    for examples in batches:
        longest = max(example.length for example in examples)
        inputs = {
            name: torch.tensor(
                [[*e.encoding[name], *([pad[name]] * (longest - e.length))] for e in examples], device=device
            )
            for name in examples[0].encoding
        }
        labels = None
        if examples[0].label is not None:
            labels = torch.tensor([e.label for e in examples], device=device)
        indices = torch.tensor([e.index for e in examples], dtype=torch.int64)
        yield Batch(inputs, labels, indices, tuple(e.place for e in examples))


def padding_values(tokenizer: Any) -> dict[str, int]:
    """Return the value that pads each model input."""
    return {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
    }
