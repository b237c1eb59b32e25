"""Reads rows of JSON lines and CSV files; `worker.engine.inputs.tables` reads Parquet and the hub.

One pass over a file's bytes indexes it, and only the rows that are used are parsed: a million rows cost 16 MB, whatever
their length.
"""

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from worker.engine.catalog.checkpoints.pointers import BEGINNING, stand_in
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.data.formats import Csv, Format, JsonLines
from worker.engine.catalog.data.images import Cell, Image, image_of
from worker.engine.catalog.data.spec import Columns, DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.primitives.strict import did_you_mean

SHOWN = 64  # characters of a text in a message
FIRST_ROWS = 100  # number of rows that are checked before a job is accepted
PARQUET = ".parquet"
PARQUET_MAGIC = b"PAR1"
FORMATS: Mapping[str, Callable[[str], Format]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonLines,
    ".csv": lambda source: Csv(source, ",", has_quotes=True),
    ".tsv": lambda source: Csv(source, "\t", has_quotes=False),
}


ASSISTANT = "assistant"
"""Role of the messages that a model answers with."""
Text = str | tuple[str, ...]
"""A text, or a tuple of texts, such as the words of one."""


@dataclass(frozen=True)
class Row:
    """One row. `place` is its place in the data set, for messages; `label` is as it was read, not yet an id."""

    place: Place
    text: Text
    text_pair: Text | None
    label: Any
    target: Text | None = None
    choices: tuple[str, ...] | None = None
    """Texts of which one follows on `text`; `label` is then the place of the right one."""
    messages: tuple[tuple[str, str], ...] | None = None
    """Role and content of each message of a conversation, which is read instead of `text`."""
    predicted: tuple[tuple[int, int], ...] | None = None
    """Beginnings and ends, in characters, of what is predicted in `text`; None: that follows from `target`."""
    image: Image | None = None
    """The image of a row without texts."""

    @property
    def content(self) -> tuple[Text | None, ...]:
        """The texts that a model reads of the row, or its image's digest: rows of equal content are the same row."""
        said = None if self.messages is None else tuple(part for message in self.messages for part in message)
        image = None if self.image is None else self.image.digest
        further = (text for text in (self.target, self.choices, said, image) if text is not None)
        return (self.text, self.text_pair, *further)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the row's texts."""
        texts = [part or "" for part in self.content]
        return sum(len(part.encode()) for text in texts for part in ([text] if isinstance(text, str) else text))


@dataclass(frozen=True)
class Cells:
    """The values of a row's columns, by the settings that name the columns.

    Methods raise InvalidDataset, which names place and column.
    """

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    """Names of the columns, by the same settings."""
    source: str
    place: Place
    folder: Path | None = None
    """Folder to which paths are relative; None where a data set has none."""
    root: Path | None = None
    """Folder in which files that rows name must lie; None: `folder`."""

    def image(self, setting: str) -> Image:
        """Return the image of a column, see `image_of`."""
        cell = Cell(self.source, self.place, self.columns[setting])
        return image_of(self.values[setting], cell, self.folder, self.root)

    def text(self, setting: str) -> str:
        """Return the text of a column."""
        return self._text(setting, self.values[setting])

    def optional_text(self, setting: str) -> str | None:
        """Return the text of a column; None if the column is not read."""
        return self.text(setting) if setting in self.values else None

    def texts(self, setting: str, what: str) -> tuple[str, ...]:
        """Return the texts of a column of lists; `what` says what they are."""
        value = self.values[setting]
        if not isinstance(value, list | tuple):
            hint = "; CSV has none, JSON lines and Parquet do" if isinstance(value, str) else ""
            raise self.problem(setting, f"is not a list of {what}{hint}")
        if not value:
            raise self.problem(setting, f"has no {what}")
        return tuple(self._text(setting, one) for one in value)

    def problem(self, setting: str, why: str) -> InvalidDataset:
        """Return the error that the value of a column is not as it should be."""
        name = self.columns[setting]
        return InvalidDataset(self.source, f"column '{name}' {why}", self.place, column=name)

    def _text(self, setting: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.problem(setting, "is not text")
        if "\0" in value:  # text that is not UTF-8 has such characters, and so have files that a disk lost
            raise self.problem(setting, "has a zero byte, which is no text")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise self.problem(setting, "is not Unicode text") from None
        return value


@dataclass(frozen=True)
class RowReader:
    """Makes rows of the columns of a data set, each of which a setting of it names. Here a row has one text or two."""

    required: tuple[str, ...] = ("text",)
    """Settings whose columns are read in any case. By default a column has the name of its setting."""
    optional: tuple[str, ...] = ("text_pair", "target")
    """Settings whose columns are read where they are named."""
    label: str | None = "label"
    """Setting of the column of labels, which is read where it is named; None if rows have no labels."""
    lists: frozenset[str] = frozenset()
    """Settings of columns that hold lists, besides that of labels, which may."""
    label_is_object: bool = False
    """Whether a label has parts, as answers have a text and a place."""
    images: frozenset[str] = frozenset()
    """Settings of columns that hold images."""

    @property
    def settings(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *([self.label] if self.label else ()))

    def columns(self, spec: Columns) -> dict[str, str]:
        """Return the names of the columns that are read, by their settings."""
        named = {setting: getattr(spec, setting) for setting in self.settings}
        return {s: name or s for s, name in named.items() if name is not None or s in self.required}

    def label_column(self, spec: Columns) -> str | None:
        """Return the name of the column of labels; None if it is not read."""
        return self.columns(spec).get(self.label or "")

    def row(self, cells: Cells) -> Row:
        """Make a row. Raises InvalidDataset, which names place and column."""
        pair, target = cells.optional_text("text_pair"), cells.optional_text("target")
        return Row(cells.place, cells.text("text"), pair, cells.values.get("label"), target)


ROWS_OF_TEXT = RowReader()


class ChoiceReader(RowReader):
    """Reads rows of a text and of choices, one of which is right, as the label says by its place or its text."""

    def row(self, cells: Cells) -> Row:
        value = cells.values["choices"]
        if not isinstance(value, list | tuple) or len(value) < 2:
            raise cells.problem("choices", "is no list of two or more texts")
        choices = cells.texts("choices", "texts")
        if not all(choices):
            raise cells.problem("choices", "has an empty text")
        label = _right_choice(cells, choices) if "label" in cells.values else None
        return Row(cells.place, cells.text("text"), None, label, choices=choices)


ROWS_OF_CHOICES = ChoiceReader(required=("text", "choices"), optional=(), lists=frozenset({"choices"}))


def _right_choice(cells: Cells, choices: Sequence[str]) -> int:
    """Return the place among the choices, from 0, of the right one, which the label names by its place or its text.

    Raises:
        InvalidDataset: it is neither, or choices have equal texts.
    """

    label = cells.values["label"]

    def refused(problem: str) -> InvalidDataset:
        return InvalidDataset(cells.source, problem, cells.place, column=cells.columns["label"])

    if isinstance(label, str) and label in choices:
        if choices.count(label) > 1:
            raise refused(f"two of its choices are '{label[:SHOWN]}', which is its label; name the right one's place")
        return choices.index(label)
    if isinstance(label, str) and label.isascii() and label.isdecimal() and len(label) < 10:
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int):
        raise refused("the label is neither the place of a choice, from 0, nor the text of one")
    if not 0 <= label < len(choices):
        raise refused(f"label {str(label)[:20]} is out of range: the choices are 0 to {len(choices) - 1}")
    return label


class ConversationReader(RowReader):
    """Reads rows of texts, or of conversations where their column is named."""

    def columns(self, spec: Columns) -> dict[str, str]:
        return super().columns(spec) if spec.messages is None else {"messages": spec.messages}

    def row(self, cells: Cells) -> Row:
        if "messages" not in cells.values:
            return super().row(cells)
        return Row(cells.place, "", None, None, messages=_messages(cells))


def _messages(cells: Cells) -> tuple[tuple[str, str], ...]:
    """Return role and content of each message of a conversation.

    Raises:
        InvalidDataset: it is no list of messages, a message has more than role and content, or none is the assistant's.
    """
    value = cells.values["messages"]
    if not isinstance(value, list | tuple) or not value:
        raise cells.problem("messages", "is no list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise cells.problem("messages", f"has a message without role and content, number {number}")
        further = [key for key, part in message.items() if key not in ("role", "content") and part is not None]
        if further:
            raise cells.problem("messages", f"has '{str(further[0])[:SHOWN]}' in message {number}, which is not read")
        parts = replace(cells, values=message, columns=dict.fromkeys(message, cells.columns["messages"]))
        messages.append((parts.text("role"), parts.text("content")))
    if not any(role == ASSISTANT for role, _ in messages):
        raise cells.problem("messages", f"has no message of the role '{ASSISTANT}', which is what is predicted")
    return tuple(messages)


class Labels(Protocol):
    """Reads labels of rows."""

    def value(self, label: Any, source: str, place: Place) -> object:
        """Return the head's value of a row's label. Raises InvalidDataset."""


class Rows(Protocol):
    """The rows of a data set, in its own order."""

    label_names: tuple[str, ...] | None
    """The data set's own names of its label ids 0, 1, …; None when it has none."""
    notes: Sequence[str]
    """Notes of rows that were joined or skipped while they were read."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Read the rows at `indices`, in that order. Raises InvalidDataset, which names place and column."""


def sample(rows: Rows, spec: DatasetSpec, count: int | None, *, shuffle: bool = True) -> list[Row]:
    """Read `count` rows without replacement in an order drawn from the spec's seed, or the first `count` in order.

    The spec's `limit` counts too: the smaller of both is read.
    """
    wanted = min(n for n in (len(rows), spec.limit, count) if n is not None)
    order = list(range(len(rows)))
    if shuffle:  # all rows, so that fewer rows are always a prefix of more
        random.Random(spec.seed).shuffle(order)
    return rows.read(order[:wanted])


class RowFile:
    """The rows of a JSON lines or CSV file.

    Raises:
        InvalidDataset: a row cannot be read; the message names the line and the column.
    """

    label_names: tuple[str, ...] | None = None

    def __init__(self, spec: DatasetSpec, reader: RowReader = ROWS_OF_TEXT) -> None:
        self._spec = spec
        self._reader = reader
        self._format = _format(spec)
        self._lines = array("Q")
        self._offsets = array("Q")
        with _opened(spec) as stream:
            for line, offset in self._format.index(stream):
                self._lines.append(line)
                self._offsets.append(offset)
        if not self._offsets:
            raise InvalidDataset(spec.source, "no rows")
        self.notes: Sequence[str] = self._format.notes

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> list[Row]:
        with _opened(self._spec) as stream:
            places = ((self._lines[index], self._offsets[index]) for index in indices)
            return [_read_row(self._format, stream, line, offset, self._spec, self._reader) for line, offset in places]


def check_first_rows(
    spec: DatasetSpec, labels: Labels | None, least_texts: int = 1, reader: RowReader = ROWS_OF_TEXT
) -> None:
    """Check the first rows, which show another format, a missing column or an unknown label.

    A Parquet file is only checked to be one; its columns are seen when its rows are read.

    Args:
        least_texts: number of distinct texts that are needed; it is checked if there are no other rows.

    Raises:
        InvalidDataset: a row cannot be read; the message names the line and the column.
    """
    with _opened(spec) as stream:
        if _suffix(spec) == PARQUET:
            if stream.read(len(PARQUET_MAGIC)) != PARQUET_MAGIC:
                raise InvalidDataset(spec.source, "not a Parquet file")
            return
        form = _format(spec)
        first = list(islice(form.index(stream), FIRST_ROWS))
        found = set()
        for line, offset in first:
            row = _read_row(form, stream, line, offset, spec, reader)
            found.add(row.content)
            if labels is not None and reader.label_column(spec) is not None:
                labels.value(row.label, spec.source, row.place)
    if not first:
        raise InvalidDataset(spec.source, "no rows")
    if len(first) < FIRST_ROWS and len(found) < least_texts:
        raise InvalidDataset(spec.source, f"{len(found)} different texts, and {least_texts} are needed")


def first_rows(spec: DatasetSpec, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a file with all of their columns; none of a Parquet file, which only workers can read.

    Raises:
        InvalidDataset: the file or a row cannot be read.
    """
    with _opened(spec) as stream:
        if _suffix(spec) == PARQUET:
            return []
        form = _format(spec)
        found = []
        for line, offset in list(islice(form.index(stream), count)):
            stream.seek(offset)
            found.append(form.parse(stream, Place("line", line)))
        return found


def row_of(values: Mapping[str, Any], place: Place, spec: DatasetSpec, reader: RowReader) -> Row:
    """Make a row of the values of its columns. Raises InvalidDataset, which names place and column."""
    columns = reader.columns(spec)
    for name in columns.values():
        if name not in values:
            raise missing_column(spec.source, name, [str(key) for key in values], place)
    cells = {setting: values[name] for setting, name in columns.items()}
    folder = spec.folder or (spec.path.parent if spec.path is not None and spec.hub is None else None)
    return reader.row(Cells(cells, columns, spec.source, place, folder, spec.root))


def missing_column(source: str, name: str, known: list[str], place: Place | None = None) -> InvalidDataset:
    return InvalidDataset(source, f"no column '{name}'{did_you_mean(name, known)}", place, column=name)


def _read_row(form: Format, stream: BinaryIO, line: int, offset: int, spec: DatasetSpec, reader: RowReader) -> Row:
    stream.seek(offset)
    place = Place("line", line)
    return row_of(form.parse(stream, place), place, spec, reader)


def _format(spec: DatasetSpec) -> Format:
    try:
        return FORMATS[_suffix(spec)](spec.source)
    except KeyError:
        known = ", ".join([*FORMATS, PARQUET])
        raise InvalidDataset(spec.source, f"the format is told by the file's name; known are {known}") from None


def _suffix(spec: DatasetSpec) -> str:
    return local_file(spec).suffix.lower()


def is_parquet(spec: DatasetSpec) -> bool:
    return spec.path is not None and _suffix(spec) == PARQUET


def local_file(spec: DatasetSpec) -> Path:
    if spec.path is None:
        raise TypeError(f"{spec.source} is no file")
    return spec.path


def refuse_stand_in(start: bytes, spec: DatasetSpec) -> None:
    """Raise InvalidDataset where a file begins as a pointer or a web page does."""
    what = stand_in(start)
    if what is not None:
        raise InvalidDataset(spec.source, f"it is not there: {what}")


@contextmanager
def _opened(spec: DatasetSpec) -> Iterator[BinaryIO]:
    path = local_file(spec)
    reads(spec.source, path.name)
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise InvalidDataset(spec.source, "cannot be read: not a regular file")
    try:
        with path.open("rb") as stream:
            refuse_stand_in(stream.read(BEGINNING), spec)
            stream.seek(0)
            yield stream
    except OSError as error:
        raise InvalidDataset(spec.source, f"cannot be read: {error.strerror}") from error
