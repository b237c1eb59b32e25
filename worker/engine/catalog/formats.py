"""File formats that hold one row after the other: where each row begins, and its columns once it is wanted."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from worker.engine.catalog.errors import InvalidDataset, Place

MAX_ROW_BYTES = 10_000_000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

csv.field_size_limit(MAX_ROW_BYTES)


class Format(Protocol):
    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        """(line from 1, byte offset) of every row of the file; blank lines are no rows."""

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        """The columns of the row that begins where the stream is, after `index` has passed it."""


class JsonLines:
    """One JSON object a line."""

    def __init__(self, source: str) -> None:
        self._source = source

    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        offset = _skip_byte_order_mark(stream)
        line = 0
        while raw := _read_line(stream, self._source, line + 1):
            line += 1
            if raw.strip():
                yield line, offset
            offset += len(raw)

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        try:
            content = json.loads(stream.readline(MAX_ROW_BYTES))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise InvalidDataset(self._source, f"not a JSON object ({reason})", place) from None
        if not isinstance(content, dict):
            raise InvalidDataset(self._source, "not a JSON object; a data set is one object a line", place)
        return content


class Csv:
    """RFC 4180 in UTF-8 with a header; every column is text, and quoted fields may hold line breaks."""

    def __init__(self, source: str, delimiter: str) -> None:
        self._source = source
        self._delimiter = delimiter
        self._header: list[str] = []

    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        lines = _DecodedLines(stream, self._source, _skip_byte_order_mark(stream))
        records = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while not self._header:
            header = self._next(records, Place("line", lines.line + 1))
            if header is None:
                return
            self._header = header
        # Columns without a name, which spreadsheets leave behind, cannot be asked for and may be as many as they like.
        name, count = Counter(name for name in self._header if name).most_common(1)[0] if any(self._header) else ("", 1)
        if count > 1:
            raise InvalidDataset(self._source, f"the header has '{name[:64]}' twice", Place("line", lines.line))
        while True:
            line, offset = lines.line + 1, lines.begin_record()
            record = self._next(records, Place("line", line))
            if record is None:
                return
            if record:
                yield line, offset

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        lines = _DecodedLines(stream, self._source, stream.tell(), place.number - 1)
        fields = self._next(csv.reader(lines, delimiter=self._delimiter, strict=True), place) or []
        if len(fields) != len(self._header):
            problem = f"{len(fields)} fields, the header has {len(self._header)}; quote what holds the delimiter"
            raise InvalidDataset(self._source, problem, place)
        return dict(zip(self._header, fields, strict=True))

    def _next(self, records: Iterator[list[str]], place: Place) -> list[str] | None:
        try:
            return next(records, None)
        except csv.Error as error:
            raise InvalidDataset(self._source, f"not CSV: {error}", place) from None


class _DecodedLines(Iterator[str]):
    """Lines of a stream as text; `line` and `offset` are where the last one ended, however far a reader has come."""

    def __init__(self, stream: BinaryIO, source: str, offset: int, line: int = 0) -> None:
        self._stream = stream
        self._source = source
        self.offset = offset
        self.line = line
        self._record, self._first_line = offset, line + 1

    def begin_record(self) -> int:
        """The offset where the next record begins; it may be as long as a row."""
        self._record, self._first_line = self.offset, self.line + 1
        return self.offset

    def __next__(self) -> str:
        raw = _read_line(self._stream, self._source, self.line + 1)
        if not raw:
            raise StopIteration
        self.line += 1
        self.offset += len(raw)
        if self.offset - self._record > MAX_ROW_BYTES:
            raise InvalidDataset(self._source, f"longer than {MAX_ROW_BYTES} bytes", Place("line", self._first_line))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InvalidDataset(self._source, "not UTF-8 text", Place("line", self.line)) from None


def _skip_byte_order_mark(stream: BinaryIO) -> int:
    """It is not part of the first row. The offset of what follows."""
    if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
        return len(BYTE_ORDER_MARK)
    stream.seek(0)
    return 0


def _read_line(stream: BinaryIO, source: str, line: int) -> bytes:
    raw = stream.readline(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        raise InvalidDataset(source, f"longer than {MAX_ROW_BYTES} bytes", Place("line", line))
    return raw
