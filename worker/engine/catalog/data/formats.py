"""File formats that hold one row after the other: they find where rows begin, and parse those that are needed."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, Protocol

from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.primitives.notes import Doubt

MAX_ROW_BYTES = 10_000_000
SHOWN_COLUMNS = 3  # number of columns that a note names
QUOTED_SHARE = 0.9  # of a column's fields; writers that quote texts leave empty and missing ones without quotes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

csv.field_size_limit(MAX_ROW_BYTES)


class Format(Protocol):
    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        """Yield (line from 1, byte offset) of every row of the file; blank lines are no rows."""

    @property
    def notes(self) -> list[str]:
        """Return notes of lines that `index` skipped or joined, once it has ended."""

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        """Read the columns of the row that begins at the stream's position, after `index` has passed it."""


class BlankLines:
    """Counts blank lines between rows; those at a file's end do not matter."""

    def __init__(self) -> None:
        self._between, self._since_row = 0, 0

    def pass_over(self) -> None:
        self._since_row += 1

    def end(self) -> None:
        """Note that a row follows."""
        self._between += self._since_row
        self._since_row = 0

    def notes(self, source: str) -> list[str]:
        return [f"{self._between} blank lines between the rows of {source} were passed over"] if self._between else []


class JsonLines:
    """Files with one JSON object a line."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._blank = BlankLines()

    @property
    def notes(self) -> list[str]:
        return self._blank.notes(self._source)

    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        offset = _skip_byte_order_mark(stream)
        line = 0
        while raw := _read_line(stream, self._source, line + 1):
            line += 1
            if raw.strip():
                self._blank.end()
                yield line, offset
            else:
                self._blank.pass_over()
            offset += len(raw)

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        try:
            content = json.loads(stream.readline(MAX_ROW_BYTES).decode(), object_pairs_hook=_with_unique_keys)
        except (ValueError, RecursionError) as error:
            raise InvalidDataset(self._source, f"not a JSON object ({_reason(error)})", place) from None
        if not isinstance(content, dict):
            raise InvalidDataset(self._source, "not a JSON object; a data set is one object a line", place)
        return content


class _TwiceError(ValueError):
    """An object has a key twice, so a reader would have to choose one of its values."""


def _reason(error: Exception) -> str:
    """Give the reason in words that quote no row."""
    match error:
        case json.JSONDecodeError():
            return error.msg
        case UnicodeDecodeError():
            return "not UTF-8 text"
        case _TwiceError():
            return str(error)
    return type(error).__name__


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _TwiceError(f"the key '{name[:64]}' twice")
    return found


class Csv:
    """UTF-8 text with a header, in which every column is text.

    With quotes it follows RFC 4180, so that quoted fields may hold line breaks. Without, as tab-separated data sets are
    published, each line is a row in which a quote is a plain character.
    """

    def __init__(self, source: str, delimiter: str, *, has_quotes: bool) -> None:
        self._source = source
        self._delimiter = delimiter
        self._quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
        self._header: list[str] = []
        self._blank = BlankLines()
        self._joined, self._joined_lines, self._perhaps_rows, self._perhaps_quoted = 0, 0, 0, 0
        self._rows = 0
        self._in_quotes = Counter[int]()
        """Number of fields that begin and end with a quote, by column, where a quote is a character."""
        self.uneven = 0
        """Number of rows that have more or fewer fields than the header; `parse` refuses them."""

    @property
    def notes(self) -> list[str]:
        notes = self._blank.notes(self._source)
        if self._joined:
            joined = f"{self._joined} rows of {self._source} are made of {self._joined_lines} lines, which quotes join"
            if self._perhaps_rows:
                # A quote that is never closed joins rows like this: it begins a text, and the next quote ends another.
                alike = (
                    f"in {self._perhaps_rows} of them each line looks like a row, with no fewer fields than the header"
                )
                notes.append(Doubt(f"{joined}; {alike}, so these may be rows of their own with a quote too few"))
            else:
                notes.append(joined)
        # A writer that quotes all texts shows in whole columns; some sentences begin and end with a quote of their own.
        columns = [index for index, count in sorted(self._in_quotes.items()) if count >= QUOTED_SHARE * self._rows]
        if columns:
            names = ", ".join(repr(self._header[index][:64]) for index in columns[:SHOWN_COLUMNS])
            more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
            fewest = min(self._in_quotes[index] for index in columns)
            notes.append(
                Doubt(
                    f"{fewest} of {self._rows} fields of {self._source} look quoted as in CSV in column {names}{more}; "
                    "in it a quote is a character, and they were read with all their quotes"
                )
            )
        elif self._perhaps_quoted:
            notes.append(
                Doubt(
                    f"{self._perhaps_quoted} fields of {self._source} look quoted as in CSV; in it a quote is a "
                    "character, and they were read with all their quotes"
                )
            )
        return notes

    def index(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        lines = _DecodedLines(stream, self._source, _skip_byte_order_mark(stream))
        records = self._records(lines)
        while not self._header:
            header = self._next(records, Place("line", lines.line + 1))
            if header is None:
                return
            self._header = header
        # Columns without a name, which spreadsheets leave behind, cannot be asked for, and there may be any number.
        name, count = Counter(name for name in self._header if name).most_common(1)[0] if any(self._header) else ("", 1)
        if count > 1:
            raise InvalidDataset(self._source, f"the header has '{name[:64]}' twice", Place("line", lines.line))
        while True:
            line, offset = lines.line + 1, lines.begin_record()
            record = self._next(records, Place("line", line))
            if record is None:
                return
            if record:
                self._count(record, lines.record)
                yield line, offset
            else:
                self._blank.pass_over()

    def _count(self, record: list[str], lines: list[str]) -> None:
        """Count peculiarities of the row that these lines make, for the notes."""
        self._blank.end()
        self._rows += 1
        self.uneven += len(record) != len(self._header)
        if len(lines) > 1:
            self._joined += 1
            self._joined_lines += len(lines)
            self._perhaps_rows += self._look_like_rows(lines)
        if self._quoting == csv.QUOTE_NONE and '"' in lines[0]:
            self._perhaps_quoted += sum(map(_looks_quoted, record))
            columns = zip(range(len(self._header)), record, strict=False)  # rows of another length are refused later
            self._in_quotes.update(index for index, field in columns if _is_in_quotes(field))

    def _look_like_rows(self, lines: list[str]) -> bool:
        """Return whether lines that quotes join may each be a row.

        The number of their fields tells, or, if a text may contain delimiters, a first or last field that looks like a
        label.
        """
        delimiters = len(self._header) - 1
        counts = [line.count(self._delimiter) for line in lines]
        if delimiters == 0 or min(counts) < delimiters:
            return False
        ends = [
            (line.partition(self._delimiter)[0], line.rpartition(self._delimiter)[2].rstrip("\r\n")) for line in lines
        ]
        return max(counts) == delimiters or any(
            all(map(_is_one_word, of_lines)) for of_lines in zip(*ends, strict=True)
        )

    def _records(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._delimiter, quoting=self._quoting, strict=True)

    def parse(self, stream: BinaryIO, place: Place) -> dict[str, Any]:
        lines = _DecodedLines(stream, self._source, stream.tell(), place.number - 1)
        fields = self._next(self._records(lines), place) or []
        if len(fields) != len(self._header):
            advice = "no field can hold a tab" if self._quoting else "quote what holds the delimiter"
            problem = f"{len(fields)} fields, the header has {len(self._header)}; {advice}"
            raise InvalidDataset(self._source, problem, place)
        return dict(zip(self._header, fields, strict=True))

    def _next(self, records: Iterator[list[str]], place: Place) -> list[str] | None:
        try:
            return next(records, None)
        except csv.Error as error:
            reason = str(error)
            if "new-line" in reason:
                reason = "a carriage return within a line; lines end in LF or CRLF"
            elif "expected after" in reason or "unexpected end" in reason:  # a field begins with a quote
                reason = f"{reason}; quote the whole field, or double the quote in it"
            raise InvalidDataset(self._source, f"not CSV: {reason}", place) from None


def _is_one_word(field: str) -> bool:
    return bool(field) and not any(character.isspace() for character in field)


def _is_in_quotes(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _looks_quoted(field: str) -> bool:
    """Return whether a field looks quoted by a writer of CSV: doubled quotes between two more."""
    inner = field[1:-1]
    return _is_in_quotes(field) and '""' in inner and '"' not in inner.replace('""', "")


class _DecodedLines(Iterator[str]):
    """Lines of a stream as text. `line` and `offset` tell where the last one ended, however far a reader has come."""

    def __init__(self, stream: BinaryIO, source: str, offset: int, line: int = 0) -> None:
        self._stream = stream
        self._source = source
        self.offset = offset
        self.line = line
        self._record, self._first_line = offset, line + 1
        self.record: list[str] = []
        """Lines read since the record began."""

    def begin_record(self) -> int:
        """Return the offset at which the next record begins; it may be as long as a row."""
        self._record, self._first_line = self.offset, self.line + 1
        self.record = []
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
            text = raw.decode()
        except UnicodeDecodeError:
            raise InvalidDataset(self._source, "not UTF-8 text", Place("line", self.line)) from None
        if "\0" in text:  # UTF-16 has such characters, and so have files that a disk lost
            raise InvalidDataset(self._source, "not text: it has a zero byte", Place("line", self.line))
        self.record.append(text)
        return text


def _skip_byte_order_mark(stream: BinaryIO) -> int:
    """Skip the mark, which is not part of the first row, and return the offset after it."""
    if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
        return len(BYTE_ORDER_MARK)
    stream.seek(0)
    return 0


def _read_line(stream: BinaryIO, source: str, line: int) -> bytes:
    raw = stream.readline(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        raise InvalidDataset(source, f"longer than {MAX_ROW_BYTES} bytes", Place("line", line))
    return raw
