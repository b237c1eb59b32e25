"""Reads rows of tables: Parquet files and data sets of the hub, through the library `datasets`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from worker.engine.catalog.data.rows import (
    ROWS_OF_TEXT,
    Row,
    RowReader,
    check_first_rows,
    local_file,
    missing_column,
    row_of,
)
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import EngineError, InvalidDataset, Place
from worker.engine.runtime.resources import is_out_of_memory, require_memory

LISTS = (datasets.List, datasets.LargeList)
MOST_ROWS = 20_000_000  # rows of a Parquet file: their order alone, drawn from the seed, takes 0.7 GB
MOST_VALUES = 200_000_000  # values in a column of lists
VALUE_BYTES = 8  # size of a number, and of a text's index among the distinct texts


class TableRows:
    """The rows of a table, whose places are row numbers.

    Raises:
        InvalidDataset: there are no rows, or a column is missing or holds neither text nor labels.
    """

    def __init__(
        self,
        table: "datasets.Dataset | EncodedTable",
        spec: DatasetSpec,
        label_names: tuple[str, ...] | None = None,
        notes: Sequence[str] = (),
        reader: RowReader = ROWS_OF_TEXT,
    ) -> None:
        self._spec = spec
        self._reader = reader
        self.label_names = label_names
        self.notes = notes
        wanted = _wanted(reader.columns(spec), spec, table.column_names)
        label = reader.label_column(spec)
        lists = {label, *(name for setting, name in reader.columns(spec).items() if setting in reader.lists)}
        images = {name for setting, name in reader.columns(spec).items() if setting in reader.images}
        for name in wanted:
            feature = table.features[name]
            if name == label and reader.label_is_object:
                continue
            if isinstance(feature, LISTS) and name in lists:
                feature = feature.feature
                if isinstance(feature, dict) and all(isinstance(part, datasets.Value) for part in feature.values()):
                    continue  # messages, whose parts are checked row by row
            if name in images and _holds_bytes(feature):
                continue
            if isinstance(feature, datasets.ClassLabel):
                if name == label:
                    self.label_names = tuple(feature.names)
            elif not isinstance(feature, datasets.Value):  # images and sounds would open files
                raise InvalidDataset(spec.source, f"column '{name}' holds {type(feature).__name__}", column=name)
        self._table = table.select_columns(wanted)  # other columns are never decoded
        if len(table) == 0:
            raise InvalidDataset(spec.source, "no rows")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: Sequence[int]) -> list[Row]:
        with _reading(self._spec):
            columns: dict[str, list[Any]] = self._table[list(indices)]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [
            row_of(row, Place("row", index + 1), self._spec, self._reader)
            for index, row in zip(indices, rows, strict=True)
        ]


class EncodedTable:
    """A table as Parquet stores it, with equal texts once. Decoded, a file of 130 kB may have 7 GB of texts.

    It has the part of the interface of `datasets.Dataset` that `TableRows` uses.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        self._table = table
        self.column_names: list[str] = table.column_names
        plain = [field.with_type(_plain(field.type)) for field in table.schema]
        self.features: Mapping[str, Any] = datasets.Features.from_arrow_schema(pyarrow.schema(plain))

    def select_columns(self, names: list[str]) -> "EncodedTable":
        return EncodedTable(self._table.select(names))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        rows = self._table.take(pyarrow.array(indices, pyarrow.int64()))
        return {
            name: [value for part in rows.column(name).chunks for value in _values(part)] for name in rows.schema.names
        }


def _plain(kind: Any) -> Any:
    """Return the type of the values, however they are encoded."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_list(kind) or types.is_list_view(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(_plain(kind.value_type))
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pyarrow.large_list(_plain(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind


def _holds_bytes(feature: Any) -> bool:
    """Return whether a column is of objects with bytes, as the hub has images."""
    return isinstance(feature, dict) and "bytes" in feature


def _values(part: Any) -> list[Any]:
    """Return the values of a column; rows with equal texts, or equal bytes, share one value.

    Of objects with bytes, these are the values.
    """
    if pyarrow.types.is_struct(part.type) and part.type.get_field_index("bytes") >= 0:
        return _values(part.flatten()[part.type.get_field_index("bytes")])
    if not pyarrow.types.is_dictionary(part.type):
        return list(part.to_pylist())
    used = pyarrow.compute.unique(part.indices.drop_null())
    texts = dict(zip(used.to_pylist(), part.dictionary.take(used).to_pylist(), strict=True))
    return [None if index is None else texts[index] for index in part.indices.to_pylist()]


def read_parquet(spec: DatasetSpec, reader: RowReader = ROWS_OF_TEXT) -> TableRows:
    """Read the rows of a local Parquet file. Raises InvalidDataset, which names a missing column."""
    check_first_rows(spec, labels=None)
    return rows_of_parquet([FileRows(local_file(spec))], spec, reader=reader)


@dataclass(frozen=True)
class FileRows:
    """Rows of a Parquet file, from `first` to before `end`; without an end, to the file's own."""

    file: Path
    first: int = 0
    end: int | None = None

    def groups(self, metadata: Any) -> Iterator[tuple[int, int, int]]:
        """Yield (row group, the first of its rows, the number of rows) for each group that has some of them."""
        begin = 0
        for index in range(metadata.num_row_groups):
            rows = metadata.row_group(index).num_rows
            first, end = max(self.first - begin, 0), rows if self.end is None else min(self.end - begin, rows)
            if first < end:
                yield index, first, end - first
            begin += rows


def rows_of_parquet(
    parts: Sequence[FileRows],
    spec: DatasetSpec,
    label_names: tuple[str, ...] | None = None,
    reader: RowReader = ROWS_OF_TEXT,
) -> TableRows:
    """Read rows of Parquet files that are one table. Row groups without any of them are not read.

    Args:
        label_names: names of the label ids; None: the names in the first file.

    Raises:
        InvalidDataset: a column is missing, or the files are no table.
        OutOfMemory: there is less memory than they take.
    """
    with _reading(spec):
        described = [pyarrow.parquet.ParquetFile(part.file) for part in parts]
        columns = _wanted(reader.columns(spec), spec, described[0].schema_arrow.names)
        plain = [name for name in columns if name != spec.messages]  # texts within structures are read one by one
        wanted = [(one.metadata, list(part.groups(one.metadata))) for part, one in zip(parts, described, strict=True)]
        _check_size(wanted, columns, spec)
        tables = []
        for part, one, (_, groups) in zip(parts, described, wanted, strict=True):
            one.close()
            with pyarrow.parquet.ParquetFile(part.file, read_dictionary=_texts(one.schema, plain)) as file:
                # Each group is read by itself, because lists of texts in several groups cannot be read at once.
                tables += [file.read_row_group(index, columns).slice(first, count) for index, first, count in groups]
                tables += [] if groups else [file.schema_arrow.empty_table().select(columns)]
        table = pyarrow.concat_tables(tables, promote_options="permissive").unify_dictionaries()
        # Only the label names are read from the metadata that the library `datasets` wrote beside the columns.
        names = label_names or _label_names(tables[0].schema.metadata or {}, reader.label_column(spec))
        return TableRows(EncodedTable(table.replace_schema_metadata(None)), spec, names, reader=reader)


def count_of_parquet(file: Path) -> int:
    """Return the number of rows of a file."""
    return int(pyarrow.parquet.read_metadata(file).num_rows)


def types_of_parquet(file: Path) -> Mapping[str, Any]:
    """Return the Arrow type of each column of a file."""
    with pyarrow.parquet.ParquetFile(file) as described:
        return {field.name: field.type for field in described.schema_arrow}


def _texts(schema: Any, columns: Sequence[str]) -> list[str]:
    """Return the paths of texts in these columns, which may be lists of texts."""
    parts = [schema.column(index) for index in range(len(schema))]
    return [
        part.path
        for part in parts
        if part.physical_type == "BYTE_ARRAY"
        and part.logical_type.type in ("STRING", "NONE")
        and _column_of(part.path, columns) is not None
    ]


def _column_of(path: str, columns: Iterable[str]) -> str | None:
    """Return the column to which a path within a file belongs: a list's values are a column within it."""
    return max((name for name in columns if f"{path}.".startswith(f"{name}.")), key=len, default=None)


def _check_size(
    wanted: Sequence[tuple[Any, Sequence[tuple[int, int, int]]]], columns: Sequence[str], spec: DatasetSpec
) -> None:
    """Check the sizes that files state in their metadata, before any of them is decoded.

    Args:
        wanted: the metadata of each file, with the row groups that are read of it, as `FileRows.groups` yields them.

    Raises:
        InvalidDataset: there are more rows, or a column has more values, than the limits allow.
        OutOfMemory: there is less memory than they take.
    """
    rows = sum(count for _, groups in wanted for _, _, count in groups)
    if rows > MOST_ROWS:
        raise InvalidDataset(spec.source, f"it has {rows} rows; {MOST_ROWS} are allowed")
    needed = 0
    counts = dict.fromkeys(columns, 0)
    for group in (metadata.row_group(index) for metadata, groups in wanted for index, _, _ in groups):
        for part in (group.column(index) for index in range(group.num_columns)):
            name = _column_of(part.path_in_schema, counts)
            if name is not None:
                counts[name] += part.num_values
                needed += part.total_uncompressed_size + VALUE_BYTES * part.num_values
    for name, count in counts.items():
        if count > MOST_VALUES:
            raise InvalidDataset(
                spec.source, f"column '{name}' has {count} values; {MOST_VALUES} are allowed", column=name
            )
    require_memory(needed)


def _label_names(metadata: Mapping[bytes, bytes], column: str | None) -> tuple[str, ...] | None:
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        if isinstance(feature, list):  # a list's only entry says what it holds, as older versions wrote it
            [feature] = feature
        elif "feature" in feature:
            feature = feature["feature"]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
        return tuple(names) if names and all(isinstance(name, str) for name in names) else None
    except (ValueError, LookupError, TypeError):
        return None


@contextmanager
def _reading(spec: DatasetSpec) -> Iterator[None]:
    """Turn exceptions of the libraries into InvalidDataset, without their messages, which may quote rows."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InvalidDataset(spec.source, f"not a readable table ({type(error).__name__})") from error


def _wanted(columns: Mapping[str, str], spec: DatasetSpec, known: list[str]) -> list[str]:
    """Return the columns to read, of those that there are. Raises InvalidDataset, which names a missing one."""
    wanted = sorted(set(columns.values()))
    for name in wanted:
        if name not in known:
            raise missing_column(spec.source, name, known)
        if known.count(name) > 1:
            raise InvalidDataset(spec.source, f"column '{name}' is there twice", column=name)
    return wanted
