"""Turns rows into padded batches of tokens."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.catalog.data.rows import Row, Text
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.methods import BATCH_TOKENS
from worker.engine.catalog.primitives.errors import InvalidDataset, Place, is_of_library
from worker.engine.catalog.tasks import Label, LabelMap
from worker.engine.inputs.chats import as_text
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.runtime.time_limits import within

BLOCK_ROWS = 1024  # rows are sorted by length within blocks only, so that a prefix of the blocks is a fair sample
LONGEST_S = 60  # seconds in which a tokenizer must cut up to a block of rows, besides those for their length
MOST_SEQUENCES = 1000  # of a row
SLOWEST = 100_000  # characters a second that it must cut; those in use cut ten times as many on one core
FIELDS = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
"""Names that the library `tokenizers` gives to inputs of models."""
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")
"""What the decoder of a model reads, beside what its encoder does."""
SHORT_ROW = 16  # tokens; a batch has at most as many rows as rows of this length fit into it


@dataclass(frozen=True)
class Example:
    """One tokenised row. `index` is its place in the data set's seeded order."""

    index: int
    place: Place
    encoding: Mapping[str, Any]
    """Model inputs by name: a list of each token's, or a tensor of an image, of the same shape in all rows."""
    label: Label | None
    """Label of the row; if it has several outputs, a tuple of their labels."""
    positions: tuple[int, ...] | None = None
    """Positions of the tokens whose outputs have labels, ascending; None if the row has one output. Those of further
    sequences go on from the first's."""
    passage: "Passage | None" = None
    """The text in which the answer to the row's question is; None if it has none."""
    others: tuple[Mapping[str, list[int]], ...] = ()
    """Further sequences of tokens, where a row has several: each has one output, or those at `positions`."""
    tokens: int | None = field(default=None, kw_only=True)
    """Number of tokens that the model makes of the row, if it is an image."""

    @property
    def outputs(self) -> int:
        return len(self.inputs) if self.positions is None else len(self.positions)

    @property
    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """The row's sequences of tokens."""
        return (self.encoding, *self.others)

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the sequence of each output at `positions`, and its token in that sequence."""
        name = DECODER_INPUTS[0] if DECODER_INPUTS[0] in self.encoding else "input_ids"  # the decoder has the outputs
        ends = [*accumulate(len(sequence[name]) for sequence in self.inputs)]
        sequence = 0
        for position in self.positions or ():
            while position >= ends[sequence]:
                sequence += 1
            yield sequence, position - (ends[sequence - 1] if sequence else 0)

    @property
    def unpadded(self) -> int:
        """Number of tokens without padding."""
        return self.tokens or sum(len(sequence["input_ids"]) for sequence in self.inputs)

    @property
    def labels(self) -> Sequence[Any]:
        """Labels of all outputs."""
        return self.label if self.positions is not None and isinstance(self.label, tuple) else (self.label,)

    @property
    def length(self) -> int:
        """Number of tokens, of several sequences padded to the longest; of text that is read and text that is written,
        the longer one's."""
        if self.tokens is not None:
            return self.tokens
        return len(self.inputs) * max(len(tokens) for sequence in self.inputs for tokens in sequence.values())


@dataclass(frozen=True)
class Batch:
    """Padded tensors on the device: inputs, (batch, tokens) each, or (batch, …) of images; labels if any, (outputs,) or
    (outputs, labels).

    The batch is of sequences, one for each row unless rows have several.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    indices: Tensor
    places: tuple[Place, ...]
    positions: Tensor | None = None
    """Whether each token's output has a label, (batch, tokens), of the decoder's tokens where it has its own; None if
    each sequence has one output."""
    tokens: int = 0
    """Number of tokens of each sequence, with padding."""
    rows: Tensor | None = None
    """The row of each sequence, (batch,); None if each row has one."""

    @property
    def required_positions(self) -> Tensor:
        """`positions` of a batch that was read for a head with several outputs a row."""
        if self.positions is None:
            raise TypeError("the batch was read for a head with one output a row")
        return self.positions

    def row_of(self, sequence: int) -> int:
        return sequence if self.rows is None else int(self.rows[sequence])

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """The row of each sequence, and its number among the row's sequences: (batch,) each."""
        if self.rows is None:
            rows = torch.arange(len(self))
            return rows, torch.zeros_like(rows)
        first = torch.searchsorted(self.rows, torch.arange(len(self), device=self.rows.device))
        return self.rows, torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]

    def by_row(self, values: Tensor) -> Tensor:
        """Sum the values of each row's sequences: (batch, …) to (rows, …)."""
        if self.rows is None:
            return values
        return values.new_zeros(len(self), *values.shape[1:]).index_add_(0, self.rows.to(values.device), values)

    @property
    def counted(self) -> Tensor:
        """Whether each token is no padding, (batch, tokens)."""
        mask = self.inputs.get("attention_mask")
        if mask is None:  # images, of which all tokens count
            device = next(iter(self.inputs.values())).device
            return torch.ones(len(self), self.tokens, dtype=torch.bool, device=device)
        return mask.bool()

    @property
    def counted_in_decoder(self) -> Tensor:
        """Whether each token that a decoder reads is no padding, (batch, tokens); they are the encoder's by default."""
        mask = self.inputs.get("decoder_attention_mask")
        return self.counted if mask is None else mask.bool()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of sequences and padded tokens: of what is read, and of what a decoder beside an encoder reads."""
        return tuple(self.counted.shape), tuple(self.counted_in_decoder.shape)

    def of_outputs(self, values: Tensor) -> Tensor:
        """Select the values of each output, row by row: (batch, …) or (batch, tokens, …) to (outputs, …)."""
        return values if self.positions is None else values[self.positions]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Passage:
    """A text in which the answer to a question is."""

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    """The first character of each of the row's tokens, and the one after its last; None for tokens of other texts.
    Those of further sequences go on from the first's."""
    answers: tuple[str, ...] | None
    """All answers that are right; empty if there is none, and None if they were not read."""


@dataclass(frozen=True)
class Answers:
    """What is to be predicted in a row, see the fields of `Example` of the same names."""

    positions: tuple[int, ...] | None
    label: Label | None
    passage: Passage | None = None
    hidden: tuple[int, ...] = ()
    """Positions of the tokens whose place the tokenizer's mask takes."""


Truncation = Literal["longest_first", "only_second"]
"""Names the text of two that is cut."""


class Reading(Protocol):
    """Reads rows for a kind of head."""

    @property
    def truncation(self) -> Truncation: ...

    def sequences(self, row: Row) -> Sequence[tuple[Text, Text | None]]:
        """Return the texts of each of the row's sequences of tokens."""

    def check_room(self, rows: Sequence[Row], spec: DatasetSpec, tokenizer: Any, limit: int) -> None:
        """Raise InvalidDataset, which names the row, where what is not cut fills the limit of tokens."""

    @property
    def tokenizer_arguments(self) -> Mapping[str, Any]:
        """Further arguments of the tokenizer."""

    def overlap(self, row: Row, encoding: Any, spec: DatasetSpec) -> int | None:
        """Return how many tokens neighbouring windows share of a row that is longer than the limit; None: it is cut.

        Args:
            encoding: the row's tokens within the limit, as the library `tokenizers` gives them.

        Raises:
            InvalidDataset: windows cannot share as many tokens as the data set asks for; the message names the row.
        """

    def whole(self, row: Row) -> Text:
        """Return the row's text that is cut into tokens."""

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        """Return what is to be predicted in a row.

        Args:
            encoding: the row's tokens as the library `tokenizers` gives them.
            label: the label of the whole row.

        Raises:
            InvalidDataset: the label does not suit these texts.
        """


class OneOutput:
    """Reads rows that have one output each."""

    truncation: Truncation = "longest_first"
    tokenizer_arguments: Mapping[str, Any] = {}

    def sequences(self, row: Row) -> Sequence[tuple[Text, Text | None]]:
        return [(self.whole(row), row.text_pair)]

    def check_room(self, rows: Sequence[Row], spec: DatasetSpec, tokenizer: Any, limit: int) -> None:
        pass

    def whole(self, row: Row) -> Text:
        return row.text

    def overlap(self, row: Row, encoding: Any, spec: DatasetSpec) -> int | None:
        return None

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        return Answers(None, label)


ONE_OUTPUT = OneOutput()


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
    reading: Reading = ONE_OUTPUT,
) -> Tokenized:
    """Tokenise `rows`, truncating to `max_length` tokens (and to the data set's own limit).

    Labels are read if `labels` is given. `first` is the place of the first row in the data set's seeded order.

    Raises:
        InvalidDataset: a row has no tokens, or a label that the head does not have.
    """
    limit = min(max_length, spec.max_length or max_length)
    by_row = [reading.sequences(row) for row in rows]
    has_pairs = any(pair is not None for sequences in by_row for _, pair in sequences)
    special = tokenizer.num_special_tokens_to_add(pair=has_pairs)
    if limit < special:  # tokenizers do not cut at all then
        raise InvalidDataset(spec.source, f"max_length {limit} has no room for the {special} special tokens")
    arguments = dict(reading.tokenizer_arguments)
    if spec.messages is not None:
        rows = [as_text(row, tokenizer, spec) for row in rows]
        arguments["add_special_tokens"] = False  # the template writes them
        by_row = [reading.sequences(row) for row in rows]
    pairs = [pair for sequences in by_row for _, pair in sequences] if has_pairs else None
    texts = [_as_listed(text) for sequences in by_row for text, _ in sequences]
    for row, sequences in zip(rows, by_row, strict=True):
        _check_number(len(sequences), row, spec)
    cut = {"truncation": reading.truncation, "max_length": limit}
    reading.check_room(rows, spec, tokenizer, limit)
    encoded = encode(tokenizer, texts, spec.source, text_pair=pairs, **cut, **arguments)
    names = [name for name in encoded if name in tokenizer.model_input_names]
    overflowing = 0
    examples = []
    ends = list(accumulate(map(len, by_row), initial=0))
    for index, row in enumerate(rows):
        places = range(ends[index], ends[index + 1])
        encoding, *others = ({name: encoded[name][place] for name in names} for place in places)
        if not all(one["input_ids"] for one in (encoding, *others)):
            raise InvalidDataset(spec.source, "no tokens", row.place)
        label = None if labels is None else labels.value(row.label, spec.source, row.place)
        tokens = encoded.encodings[places[0]] if encoded.encodings else None
        is_cut = any(encoded.encodings[place].overflowing != [] for place in places if encoded.encodings)
        stride = reading.overlap(row, tokens, spec) if is_cut else None
        windows = [tokens]
        if stride is not None:
            [(text, pair)] = by_row[index]
            again = encode(tokenizer, [text], spec.source, text_pair=[pair], stride=stride, **cut, **arguments)
            windows = [again.encodings[0], *again.encodings[0].overflowing]
            _check_number(len(windows), row, spec)
            encoding, *others = ({name: getattr(one, FIELDS[name]) for name in names} for one in windows)
        overflowing += is_cut and stride is None
        if tokens is not None and tokens.overflowing and (row.target is not None or row.predicted is not None):
            problem = f"it is longer than the {limit} tokens that are allowed, and what is to be predicted would be cut"
            raise InvalidDataset(spec.source, f"{problem}; set a larger max_length, or leave it out", row.place)
        found = _joined([reading.answers(row, window, label, spec.source) for window in windows], windows)
        if found.hidden:
            encoding["input_ids"] = _masked(encoding["input_ids"], found.hidden, tokenizer, spec.source)
        answered = (found.label, found.positions, found.passage)
        examples.append(Example(first + index, row.place, encoding, *answered, tuple(others)))
    return Tokenized(examples, overflowing)


def _joined(found: Sequence[Answers], windows: Sequence[Any]) -> Answers:
    """Join what is to be predicted in each of a row's windows."""
    if len(found) == 1:
        return found[0]
    starts = accumulate((len(window.ids) for window in windows), initial=0)
    positions = [start + place for start, one in zip(starts, found, strict=False) for place in one.positions or ()]
    labels = [one.label for one in found if isinstance(one.label, tuple)]
    passages = [one.passage for one in found if one.passage is not None]
    passage = replace(passages[0], spans=tuple(span for one in passages for span in one.spans)) if passages else None
    return Answers(tuple(positions), tuple(chain.from_iterable(labels)) if labels else None, passage)


def _check_number(sequences: int, row: Row, spec: DatasetSpec) -> None:
    """Raise InvalidDataset where a row has too many sequences: all are computed together."""
    if sequences > MOST_SEQUENCES:
        problem = f"it has {sequences} choices, or windows of its context; {MOST_SEQUENCES} are allowed"
        raise InvalidDataset(spec.source, problem, row.place)


def _masked(tokens: Sequence[int], hidden: Sequence[int], tokenizer: Any, source: str) -> list[int]:
    """Put the mask in the place of tokens. Raises InvalidDataset where there is none."""
    if tokenizer.mask_token_id is None:
        raise InvalidDataset(source, "it cannot be read: the checkpoint's tokenizer has no mask token")
    return [tokenizer.mask_token_id if place in hidden else token for place, token in enumerate(tokens)]


def encode(tokenizer: Any, texts: Sequence[Any], source: str, **arguments: Any) -> Any:
    """Cut texts into tokens, without padding. Raises InvalidDataset where the tokenizer fails, or takes too long."""
    most = LONGEST_S + sum(map(len, map(str, texts))) / SLOWEST
    try:
        return within(most, partial(tokenizer, texts, padding=False, verbose=False, **arguments))
    except TimeoutError as error:
        problem = (
            f"the checkpoint's tokenizer takes more than {most:.0f} s for {len(texts)} rows: a pattern in its "
            "tokenizer.json (normalizer, pre_tokenizer) tries too many ways to match; use that of the original model"
        )
        raise InvalidDataset(source, problem) from error
    except BaseException as error:  # tokenizers raise bare exceptions and panic, and their texts may quote a row
        if is_out_of_memory(error) or not is_of_library(error):
            raise
        problem = f"the checkpoint's tokenizer fails on it ({type(error).__name__}); does it have its unknown token?"
        raise InvalidDataset(source, problem) from error


def _as_listed(text: Text) -> str | list[str]:
    return text if isinstance(text, str) else list(text)


def digest_of(examples: Sequence[Example]) -> str:
    """Return the sha256, in hexadecimal, over what is read of each row and what it is judged by, in their order.

    The places of rows in their data set do not count.
    """
    digest = hashlib.sha256()
    for example in examples:
        content = {name: value for name, value in _fields(example).items() if name not in ("index", "place")}
        digest.update(json.dumps(content, default=_as_json).encode() + b"\n")
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Return what stands in a digest for what is no JSON: a tensor's bytes, or the fields of an object."""
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
    if is_dataclass(value):
        return _fields(value)
    raise TypeError(f"a row has {type(value).__name__}, which has no digest")


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def labels_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return the labels of all outputs, row by row: (outputs,) or (outputs, labels)."""
    return np.array([label for example in examples for label in example.labels], dtype=np.float64)


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


def collate(batches: Iterable[Sequence[Example]], pad: Mapping[str, int], device: torch.device) -> Iterator[Batch]:
    """Pad each batch to its longest row; `pad` is the padding value of every model input."""
    for examples in batches:
        sequences = [sequence for example in examples for sequence in example.inputs]
        longest = max(example.length // len(example.inputs) for example in examples)
        inputs = {name: _stacked(sequences, name, pad).to(device) for name in examples[0].encoding}
        rows = None
        if len(sequences) > len(examples):
            rows = torch.tensor([row for row, e in enumerate(examples) for _ in e.inputs], device=device)
        labels = None
        if examples[0].label is not None:
            labels = torch.tensor([label for e in examples for label in e.labels], device=device)
        positions = None
        if examples[0].positions is not None:
            starts = accumulate((len(example.inputs) for example in examples), initial=0)
            each = [
                (start + sequence, token)
                for start, e in zip(starts, examples, strict=False)
                for sequence, token in e.places
            ]
            of_sequence, of_token = torch.tensor(each, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
            width = inputs[DECODER_INPUTS[0]].shape[1] if DECODER_INPUTS[0] in inputs else longest
            positions = torch.zeros(len(sequences), width, dtype=torch.bool, device=device)
            positions[of_sequence, of_token] = True
        indices = torch.tensor([e.index for e in examples], dtype=torch.int64)
        yield Batch(inputs, labels, indices, tuple(e.place for e in examples), positions, longest, rows)


def _stacked(sequences: Sequence[Mapping[str, Any]], name: str, pad: Mapping[str, int]) -> Tensor:
    values = [sequence[name] for sequence in sequences]
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    longest = max(map(len, values))
    return torch.tensor([[*one, *([pad[name]] * (longest - len(one)))] for one in values])


def padding_values(tokenizer: Any, pad_token: int | None = None) -> dict[str, int]:
    """Return the value that pads each model input.

    Args:
        pad_token: the token that the model takes for padding; None: any token will do, and the tokenizer's is taken.
    """
    pad = (tokenizer.pad_token_id or 0) if pad_token is None else pad_token
    return {
        "input_ids": pad,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
        "decoder_input_ids": pad,
        "decoder_attention_mask": 0,
    }
