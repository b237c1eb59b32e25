"""Rows of tables: Parquet files and data sets of the hub, through the library `datasets`."""

from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from worker.engine.catalog.errors import InvalidDataset, Place
from worker.engine.catalog.rows import Row, local_file, missing_column, row_of
from worker.engine.catalog.spec import DatasetSpec


class TableRows:
    """The rows of a table; their places are row numbers.

    Raises:
        InvalidDataset: no rows, or a column that is not there.
    """

    def __init__(self, table: datasets.Dataset, spec: DatasetSpec) -> None:
        wanted = [name for name in (spec.text, spec.text_pair, spec.label) if name is not None]
        for name in wanted:
            if name not in table.column_names:
                raise missing_column(spec.source, name, table.column_names)
        if len(table) == 0:
            raise InvalidDataset(spec.source, "no rows")
        self._spec = spec
        self._table = table.select_columns(sorted(set(wanted)))  # what is not asked for is never decoded
        label = self._table.features[spec.label] if spec.label else None
        self.label_names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: Sequence[int]) -> list[Row]:
        columns: dict[str, list[Any]] = self._table[list(indices)]
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [row_of(row, Place("row", index + 1), self._spec) for index, row in zip(indices, rows, strict=True)]


def read_parquet(spec: DatasetSpec) -> datasets.Dataset:
    """The asked columns of a local Parquet file. Raises InvalidDataset naming a missing column."""
    try:
        with pyarrow.parquet.ParquetFile(local_file(spec)) as file:
            known = file.schema_arrow.names
            wanted = {name for name in (spec.text, spec.text_pair, spec.label) if name is not None}
            return datasets.Dataset(file.read([name for name in known if name in wanted]))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InvalidDataset(spec.source, f"not a readable Parquet file ({type(error).__name__})") from error
