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
from worker.engine.catalog.data.spec import DatasetSpec
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


Text = str | tuple[str, ...]
"""A text, or a tuple of its words."""


class TextColumn:
    """Reads a row's text from its column. Here each value is one text."""

    is_list = False
    """Whether a value is a list; then a row has no second text."""

    def read(self, value: Any, name: str, source: str, place: Place) -> Text:
        """Read a value. Raises InvalidDataset, which names place and column."""
        return read_text(value, name, source, place)


ONE_TEXT = TextColumn()


def read_text(value: Any, name: str, source: str, place: Place) -> str:
    """Check a text of a column, and return it. Raises InvalidDataset, which names place and column."""
    if not isinstance(value, str):
        raise InvalidDataset(source, f"column '{name}' is not text", place, column=name)
    if "\0" in value:  # text that is not UTF-8 has such characters, and so have files that a disk lost
        raise InvalidDataset(source, f"column '{name}' has a zero byte, which is no text", place, column=name)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise InvalidDataset(source, f"column '{name}' is not Unicode text", place, column=name) from None
    return value


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

    @property
    def content(self) -> tuple[Text | None, ...]:
        """The texts that a model reads of the row: rows of equal content are the same row."""
        further = (text for text in (self.target, self.choices) if text is not None)
        return (self.text, self.text_pair, *further)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the row's texts."""
        texts = [part or "" for part in self.content]
        return sum(len(part.encode()) for text in texts for part in ([text] if isinstance(text, str) else text))


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

    def __init__(self, spec: DatasetSpec, texts: TextColumn = ONE_TEXT) -> None:
        self._spec = spec
        self._texts = texts
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
            return [_read_row(self._format, stream, line, offset, self._spec, self._texts) for line, offset in places]


def check_first_rows(
    spec: DatasetSpec, labels: Labels | None, least_texts: int = 1, texts: TextColumn = ONE_TEXT
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
            row = _read_row(form, stream, line, offset, spec, texts)
            found.add(row.content)
            if labels is not None and spec.label is not None:
                labels.value(row.label, spec.source, row.place)
    if not first:
        raise InvalidDataset(spec.source, "no rows")
    if len(first) < FIRST_ROWS and len(found) < least_texts:
        raise InvalidDataset(spec.source, f"{len(found)} different texts, and {least_texts} are needed")


def row_of(columns: Mapping[str, Any], place: Place, spec: DatasetSpec, texts: TextColumn = ONE_TEXT) -> Row:
    """Make a row of the columns to read. Raises InvalidDataset, which names place and column."""

    def column(name: str) -> Any:
        if name not in columns:
            raise missing_column(spec.source, name, [str(key) for key in columns], place)
        return columns[name]

    def text(name: str) -> Text:
        return texts.read(column(name), name, spec.source, place)

    if texts.is_list and spec.text_pair:
        raise InvalidDataset(spec.source, "text_pair is for texts, not for lists", place, column=spec.text_pair)
    row = Row(
        place=place,
        text=text(spec.text),
        text_pair=text(spec.text_pair) if spec.text_pair else None,
        label=column(spec.label) if spec.label else None,
        target=text(spec.target) if spec.target else None,
    )
    if not spec.choices:
        return row
    choices = read_choices(column(spec.choices), spec.choices, spec.source, place)
    label = right_choice(row.label, choices, spec, place) if spec.label else None
    return replace(row, choices=choices, label=label)


def read_choices(value: Any, name: str, source: str, place: Place) -> tuple[str, ...]:
    """Check a list of at least two texts, none of them empty. Raises InvalidDataset, which names place and column."""
    if not isinstance(value, list) or len(value) < 2:
        raise InvalidDataset(source, f"column '{name}' is no list of two or more texts", place, column=name)
    choices = tuple(read_text(choice, name, source, place) for choice in value)
    if not all(choices):
        raise InvalidDataset(source, f"column '{name}' has an empty text", place, column=name)
    return choices


def right_choice(label: Any, choices: Sequence[str], spec: DatasetSpec, place: Place) -> int:
    """Return the place among the choices, from 0, of the right one, which the label names by its place or its text.

    Raises:
        InvalidDataset: it is neither, or choices have equal texts.
    """

    def refused(problem: str) -> InvalidDataset:
        return InvalidDataset(spec.source, problem, place, column=spec.label)

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


def missing_column(source: str, name: str, known: list[str], place: Place | None = None) -> InvalidDataset:
    return InvalidDataset(source, f"no column '{name}'{did_you_mean(name, known)}", place, column=name)


def _read_row(form: Format, stream: BinaryIO, line: int, offset: int, spec: DatasetSpec, texts: TextColumn) -> Row:
    stream.seek(offset)
    place = Place("line", line)
    return row_of(form.parse(stream, place), place, spec, texts)


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
