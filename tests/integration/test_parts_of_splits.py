"""A part of a split is read as the library `datasets` understands it, and nothing else of its files."""

from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import dataset_spec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.inputs.hub import parts_of_split
from worker.engine.inputs.tables import rows_of_parquet

SPLITS = [
    "train", "test", "train[:10]", "train[10:]", "train[-3:]", "train[17:18]", "train[4:93]", "train[:50%]",
    "train[33%:66%]", "train[-10%:]", "train[:33%](pct1_dropremainder)", "train+test", "test[1:]+train[149:]",
    "train[:5]+train[:5]",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files of 67, 1 and 82 rows, in row groups of 20, and another split of one file."""
    folder, found, begin = tmp_path_factory.mktemp("splits"), dict[str, list[Path]](), 0
    for split, counts in {"train": (67, 1, 82), "test": (7,)}.items():
        for number, count in enumerate(counts):
            texts = pyarrow.array([f"text {index}" for index in range(begin, begin + count)], pyarrow.string())
            labels = pyarrow.array(range(begin, begin + count), pyarrow.int64())
            file = folder / f"{split}-{number}.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), file, row_group_size=20)
            found.setdefault(split, []).append(file)
            begin += count
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_are_those_of_the_library(files: dict[str, list[Path]], tmp_path: Path, split: str) -> None:
    named = {name: [str(file) for file in of_split] for name, of_split in files.items()}
    wanted = datasets.load_dataset("parquet", data_files=named, split=split, cache_dir=str(tmp_path))
    rows = rows_of_parquet(parts_of_split(split, files), dataset_spec(files["train"][0]))
    assert [(row.text, row.label) for row in rows.read(range(len(rows)))] == list(
        zip(wanted["text"], wanted["label"], strict=True)
    )


def test_a_part_without_rows_is_refused_as_one(files: dict[str, list[Path]]) -> None:
    with pytest.raises(InvalidDataset, match="no rows"):
        rows_of_parquet(parts_of_split("train[5:5]", files), dataset_spec(files["train"][0]))


@pytest.mark.parametrize(
    "split", ["dev", "train[", "train[20]", "train[x:]", "train[:1000000000000]", "train[:200%]", ""]
)
def test_what_is_no_split_is_left_to_the_library(files: dict[str, list[Path]], tmp_path: Path, split: str) -> None:
    named = {name: [str(file) for file in of_split] for name, of_split in files.items()}
    parts = parts_of_split(split, files)
    try:
        wanted = datasets.load_dataset("parquet", data_files=named, split=split, cache_dir=str(tmp_path))
    except (ValueError, AssertionError):
        assert parts == []
    else:
        assert len(rows_of_parquet(parts, dataset_spec(files["train"][0]))) == len(wanted)


def test_other_row_groups_are_not_read(files: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    of_group = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: pyarrow.parquet.ParquetFile, index: int, *rest: object) -> pyarrow.Table:
        read.append(index)
        return of_group(self, index, *rest)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    assert len(rows_of_parquet(parts_of_split("train[26:29]", files), dataset_spec(files["train"][0]))) == 3
    assert read == [1]
