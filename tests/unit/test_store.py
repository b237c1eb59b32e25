"""The store of statistics: what was kept comes back, once, whatever else happens to the folder."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker.engine.catalog.errors import StorageError
from worker.engine.store import ASSEMBLED, StatisticsStore, address

FACTS = {"statistic": "gram", "checkpoint": "sha256:1", "rows": "2"}
PARTS = [{"layers.0.heads": torch.eye(3)}, {"layers.1.heads": torch.ones(2, 2), "pooler": torch.zeros(1)}]


def test_what_was_kept_comes_back_by_its_facts_alone(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        assert store.get(FACTS) is None
        written = store.put(FACTS, PARTS)
        for found in (written, store.get(dict(reversed(FACTS.items())))):
            assert found is not None
            assert set(found) == {"layers.0.heads", "layers.1.heads", "pooler"}
            assert all(torch.equal(found[name], tensor) for part in PARTS for name, tensor in part.items())
        for name in FACTS:
            assert store.get({**FACTS, name: "other"}) is None
    assert [entry.name for entry in tmp_path.iterdir()] == [address(FACTS)]


def test_what_fails_while_it_is_computed_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield PARTS[0]
        raise ValueError("a gradient is NaN")

    with StatisticsStore(tmp_path, 10**9) as store:
        with pytest.raises(ValueError, match="a gradient is NaN"):
            store.put(FACTS, parts())
        assert store.get(FACTS) is None
    assert list(tmp_path.iterdir()) == []


def test_the_longest_unused_go_when_there_is_too_much_and_what_is_open_stays_readable(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10_000) as store:
        for number in range(3):
            store.put({"number": number}, [{"x": torch.full((1000,), float(number))}])  # 4 kB each
            os.utime(tmp_path / address({"number": number}), (number, number))
        oldest = store.get({"number": 0})  # used now
        assert oldest is not None
        store.put({"number": 3}, [{"x": torch.zeros(1000)}])
        assert {number for number in range(4) if store.get({"number": number})} == {0, 2, 3}
        store.put({"number": 4}, [{"x": torch.zeros(5000)}])
        store.put({"number": 5}, [{"x": torch.zeros(1)}])  # makes room first, of all that was there
        assert not (tmp_path / address({"number": 0})).exists()
        assert torch.equal(oldest["x"], torch.zeros(1000))


@pytest.mark.parametrize("damage", ["other tensors", "other numbers", "other shapes"])
def test_an_entry_that_was_written_by_another_hand_counts_as_none(tmp_path: Path, damage: str) -> None:
    other = {"other tensors": {"x": torch.eye(3)}, "other numbers": {"layers.0.heads": torch.full((3, 3), torch.nan)}}
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, PARTS)
        part = sorted((tmp_path / address(FACTS)).glob("*.safetensors"))[0]
        save_file(other.get(damage, {"layers.0.heads": torch.eye(2)}), part)
        assert store.get(FACTS) is None


def test_a_folder_that_cannot_be_used_is_told_when_something_is_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with StatisticsStore(tmp_path / "file", 10**9) as store:
        assert store.get(FACTS) is None
        with pytest.raises(StorageError, match="cannot be used: Not a directory"):
            store.put(FACTS, PARTS)


def test_a_damaged_entry_counts_as_none_and_is_replaced(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, PARTS)
        part = next((tmp_path / address(FACTS)).glob("*.safetensors"))
        part.write_bytes(part.read_bytes()[:-4])
        assert store.get(FACTS) is None
        store.put(FACTS, PARTS)
        found = store.get(FACTS)
        assert found is not None
        assert torch.equal(found["layers.0.heads"], torch.eye(3))


def test_an_entry_that_lost_a_part_counts_as_none_and_is_replaced(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        for lost in ("00001.safetensors", "about.json"):
            store.put(FACTS, PARTS)
            (tmp_path / address(FACTS) / lost).unlink()
            with StatisticsStore(tmp_path, 10**9) as other:
                assert other.get(FACTS) is None
                assert len(other.put(FACTS, PARTS)) == 3
                assert other.get(FACTS) is not None
    assert [entry.name for entry in tmp_path.iterdir()] == [address(FACTS)]


@pytest.mark.parametrize("junk", ["file", "folder"])
def test_junk_under_an_address_is_replaced(tmp_path: Path, junk: str) -> None:
    entry = tmp_path / address(FACTS)
    if junk == "file":
        entry.write_text("junk")
    else:
        (entry / "more").mkdir(parents=True)
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, PARTS)
        found = store.get(FACTS)
        assert found is not None
        assert torch.equal(found["layers.0.heads"], torch.eye(3))


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    received = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            StatisticsStore(tmp_path, 10**9) as store,
            pytest.raises(StorageError, match="cannot be used: File too large"),
        ):
            store.put(FACTS, [{"x": torch.zeros(10_000)}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, received)
    assert list(tmp_path.iterdir()) == []


def test_two_that_measure_the_same_at_once_leave_one_entry(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as one, StatisticsStore(tmp_path, 10**9) as other:
        first, second = one.put(FACTS, PARTS), other.put(FACTS, PARTS)
        assert torch.equal(first["layers.0.heads"], second["layers.0.heads"])
    assert [entry.name for entry in tmp_path.iterdir()] == [address(FACTS)]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    for name, age in (("old", 7200.0), ("young", 60.0)):
        left = tmp_path / f"{ASSEMBLED}{name}"
        left.mkdir()
        (left / "00000.safetensors").write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, PARTS)
    assert {entry.name for entry in tmp_path.iterdir()} == {f"{ASSEMBLED}young", address(FACTS)}
