"""Rows of a JSON lines file: found by one pass over the bytes, parsed only when they are used.

A million rows cost 8 MB, whatever their length.
"""

import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.catalog.errors import InvalidDataset
from worker.engine.catalog.labels import LabelMap
from worker.engine.catalog.spec import DatasetSpec
from worker.engine.catalog.strict import did_you_mean

MAX_LINE_BYTES = 10_000_000
FIRST_ROWS = 100  # what is checked before a job is accepted


@dataclass(frozen=True)
class Row:
    """One row. `line` is its line in the file, from 1, for messages; `label` is as read, not yet an id."""

    line: int
    text: str
    text_pair: str | None
    label: Any


class RowFile(Sequence[Row]):
    """The rows of a data set in the file's order; blank lines are no rows.

    Raises:
        InvalidDataset: names the line and the column.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._offsets = array("Q")
        self._lines = array("Q")
        for line, offset, raw in _lines(spec.path, spec.source):
            if raw.strip():
                self._offsets.append(offset)
                self._lines.append(line)
        if not self._offsets:
            raise InvalidDataset(spec.source, "no rows")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            with self._spec.path.open("rb") as stream:
                stream.seek(self._offsets[index])
                raw = stream.readline(MAX_LINE_BYTES)
        except OSError as error:
            raise InvalidDataset(self._spec.source, f"cannot be read: {error.strerror}") from error
        return parse_row(raw, self._lines[index], self._spec)

    def sample(self, count: int | None, *, shuffle: bool = True) -> list[Row]:
        """`count` rows without replacement in an order drawn from the spec's seed, or the first `count` in order.

        The spec's `limit` counts too: the smaller of both is read.
        """
        wanted = min(n for n in (len(self), self._spec.limit, count) if n is not None)
        order = list(range(len(self)))
        if shuffle:  # all of it, so that fewer rows are always a prefix of more
            random.Random(self._spec.seed).shuffle(order)
        return [self[index] for index in order[:wanted]]


def check_first_rows(spec: DatasetSpec, labels: LabelMap | None) -> None:
    """Refuse what the first rows show: not JSON, a missing column, an unknown label.

    Raises:
        InvalidDataset: names the line and the column.
    """
    found = False
    for line, _, raw in _lines(spec.path, spec.source):
        if line > FIRST_ROWS:
            break
        if raw.strip():
            found = True
            row = parse_row(raw, line, spec)
            if labels is not None and spec.label is not None:
                labels.value(row.label, spec.source, line)
    if not found:
        raise InvalidDataset(spec.source, "no rows")


def parse_row(raw: bytes, line: int, spec: DatasetSpec) -> Row:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InvalidDataset(spec.source, f"not a JSON object ({reason})", line=line) from None
    if not isinstance(content, dict):
        raise InvalidDataset(spec.source, "not a JSON object", line=line)

    def column(name: str) -> Any:
        if name not in content:
            hint = did_you_mean(name, [str(key) for key in content])
            raise InvalidDataset(spec.source, f"no column '{name}'{hint}", line=line, column=name)
        return content[name]

    def text(name: str) -> str:
        value = column(name)
        if not isinstance(value, str):
            raise InvalidDataset(spec.source, f"column '{name}' is not text", line=line, column=name)
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise InvalidDataset(spec.source, f"column '{name}' is not Unicode text", line=line, column=name) from None
        return value

    return Row(
        line=line,
        text=text(spec.text),
        text_pair=text(spec.text_pair) if spec.text_pair else None,
        label=column(spec.label) if spec.label else None,
    )


def _lines(path: Path, source: str) -> Iterator[tuple[int, int, bytes]]:
    """(line from 1, byte offset, bytes) of every line."""
    if path.exists() and not path.is_file():  # a pipe would be waited on for ever
        raise InvalidDataset(source, "cannot be read: not a regular file")
    try:
        with path.open("rb") as stream:
            offset = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark is not part of the first row
            stream.seek(offset)
            line = 0
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                line += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise InvalidDataset(source, f"longer than {MAX_LINE_BYTES} bytes", line=line)
                yield line, offset, raw
                offset += len(raw)
    except OSError as error:
        raise InvalidDataset(source, f"cannot be read: {error.strerror}") from error
