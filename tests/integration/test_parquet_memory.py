"""What a Parquet file takes to read does not follow from what it could be decoded to."""

import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import dataset_spec
from worker.engine.catalog.errors import InvalidDataset
from worker.engine.tables import MOST_ROWS, read_parquet

READ = """
import resource, sys
from pathlib import Path
from tests.tiny import dataset_spec
from worker.engine.tables import read_parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_parquet(dataset_spec(Path(sys.argv[1])))
found = rows.read(range(len(rows)))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(found), len(found[0].text), found[-1].label, grown * 1024)
"""
MOST_BYTES = 300_000_000
SCHEMA = pyarrow.schema({"text": pyarrow.string(), "label": pyarrow.string()})


def equal_texts(file: Path, *, rows: int, characters: int) -> Path:
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * characters]))
    labels = pyarrow.array([1] * rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), file, store_schema=False)
    return file


def test_equal_texts_are_held_once(tmp_path: Path) -> None:
    file = equal_texts(tmp_path / "rows.parquet", rows=70_000, characters=100_000)
    assert file.stat().st_size < 200_000
    output = subprocess.run([sys.executable, "-c", READ, str(file)], check=True, capture_output=True, text=True).stdout
    rows, characters, label, grown = map(int, output.split())
    assert (rows, characters, label) == (70_000, 100_000, 1)
    assert grown < MOST_BYTES


def test_more_rows_than_their_order_has_room_for_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    with pyarrow.parquet.ParquetWriter(file, SCHEMA) as writer:
        nulls = pyarrow.nulls(MOST_ROWS // 4, pyarrow.string())
        nothing = pyarrow.table({"text": nulls, "label": nulls})
        for _ in range(5):
            writer.write_table(nothing)
    assert file.stat().st_size < 200_000
    with pytest.raises(InvalidDataset, match=f"{MOST_ROWS} are allowed"):
        read_parquet(dataset_spec(file))


def test_texts_that_differ_are_read_in_any_order_from_several_row_groups(tmp_path: Path) -> None:
    texts = [f"text {index % 5}" for index in range(40)]
    table = pyarrow.table({"text": texts, "label": list(range(40))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    rows = read_parquet(dataset_spec(tmp_path / "rows.parquet"))
    order = [39, 0, 20, 7, 6, 20]
    assert [(row.text, row.label) for row in rows.read(order)] == [(texts[index], index) for index in order]
