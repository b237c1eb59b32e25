"""What a Parquet file takes to read does not follow from what it could be decoded to."""

import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import dataset_spec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.inputs.tables import MOST_ROWS, read_parquet

READ = """
import resource, sys
from pathlib import Path
from tests.tiny import dataset_spec
from worker.engine.inputs.tables import read_parquet
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


@pytest.mark.parametrize("column", ["label", "the.label"])
def test_equal_texts_in_lists_are_held_once(tmp_path: Path, column: str) -> None:
    indices = pyarrow.array([0] * 100_000, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * 100_000]))
    lists = pyarrow.ListArray.from_arrays(pyarrow.array(range(0, 100_001, 1000), pyarrow.int32()), texts)
    table = pyarrow.table({"text": ["one", "two"] * 50, column: lists})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", store_schema=False, row_group_size=30)
    read = READ.replace("Path(sys.argv[1])", f"Path(sys.argv[1]), label={column!r}").replace(
        "found[-1].label", "len(found[-1].label)"
    )
    command = [sys.executable, "-c", read.replace("range(len(rows))", "[99]"), str(tmp_path / "rows.parquet")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows, _, labels, grown = map(int, output.split())
    assert (rows, labels) == (1, 1000)
    assert grown < MOST_BYTES


def test_lists_count_in_the_memory_that_a_table_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("worker.engine.inputs.tables.require_memory", needed.append)
    for column in ("label", "the.label"):
        table = pyarrow.table({"text": ["one"] * 100, column: [list(range(1000))] * 100})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        read_parquet(dataset_spec(tmp_path / "rows.parquet", label=column))
    assert needed[0] >= 100 * 1000 * 8
    assert needed[1] >= 100 * 1000 * 8


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
