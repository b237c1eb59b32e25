"""Rows of tables: Parquet files and data sets of the hub, through the library `datasets`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from worker.engine.catalog.errors import EngineError, InvalidDataset, Place
from worker.engine.catalog.rows import Row, check_first_rows, local_file, missing_column, row_of
from worker.engine.catalog.spec import DatasetSpec
from worker.engine.resources import is_out_of_memory, require_memory

LISTS = (datasets.List, datasets.LargeList)


class TableRows:
    """The rows of a table; their places are row numbers.

    Raises:
        InvalidDataset: no rows, or a column that is not there or holds neither text nor labels.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        spec: DatasetSpec,
        label_names: tuple[str, ...] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._spec = spec
        self.label_names = label_names
        self.notes = notes
        wanted = _wanted(spec, table.column_names)
        for name in wanted:
            feature = table.features[name]
            if name == spec.label and isinstance(feature, LISTS):  # of a head whose labels apply each by itself
                feature = feature.feature
            if isinstance(feature, datasets.ClassLabel):
                if name == spec.label:
                    self.label_names = tuple(feature.names)
            elif not isinstance(feature, datasets.Value):  # images and sounds are files that would be opened
                raise InvalidDataset(spec.source, f"column '{name}' holds {type(feature).__name__}", column=name)
        self._table = table.select_columns(wanted)  # what is not asked for is never decoded
        if len(table) == 0:
            raise InvalidDataset(spec.source, "no rows")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: Sequence[int]) -> list[Row]:
        with _reading(self._spec):
            columns: dict[str, list[Any]] = self._table[list(indices)]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [row_of(row, Place("row", index + 1), self._spec) for index, row in zip(indices, rows, strict=True)]


def read_parquet(spec: DatasetSpec) -> TableRows:
    """The rows of a local Parquet file. Raises InvalidDataset naming a missing column."""
    check_first_rows(spec, labels=None)
    with _reading(spec), pyarrow.parquet.ParquetFile(local_file(spec)) as file:
        columns = _wanted(spec, file.schema_arrow.names)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        parts = [group.column(index) for group in groups for index in range(group.num_columns)]
        require_memory(sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns))
        table = file.read(columns)
        # Of what the library `datasets` wrote beside the columns, the label names alone are wanted.
        names = _label_names(table.schema.metadata or {}, spec)
        return TableRows(datasets.Dataset(table.replace_schema_metadata(None)), spec, names)


def _label_names(metadata: Mapping[bytes, bytes], spec: DatasetSpec) -> tuple[str, ...] | None:
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][spec.label]
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
    """The libraries raise whatever a malformed file happens to break, in words that may quote a row."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InvalidDataset(spec.source, f"not a readable table ({type(error).__name__})") from error


def _wanted(spec: DatasetSpec, known: list[str]) -> list[str]:
    """The asked columns. Raises InvalidDataset naming one that is not there."""
    wanted = {name for name in (spec.text, spec.text_pair, spec.label) if name is not None}
    for name in sorted(wanted):
        if name not in known:
            raise missing_column(spec.source, name, known)
        if known.count(name) > 1:
            raise InvalidDataset(spec.source, f"column '{name}' is there twice", column=name)
    return sorted(wanted)
