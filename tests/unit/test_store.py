"""The store of statistics: what was kept comes back, once, whatever else happens to the folder."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import HANGS_S, wait_until
from worker.engine.catalog.contracts.statistics import ABOUT, ASSEMBLED, Facts, Origin, Tokens
from worker.engine.catalog.methods import GRAM, PARAMETER_FISHER
from worker.engine.catalog.primitives.errors import StorageError
from worker.engine.scoring.store import LOCK, LOCK_POLL_S, StatisticsStore

TOKENS = Tokens(tokenizer="3", inputs=["input_ids"], max_length=128, versions={"tokenizers": "1"})
FACTS = Facts(statistic=GRAM, checkpoint="sha256:1", rows="2", tokens=TOKENS, precision="float32")
ORIGIN = Origin(checkpoint="local:expert", dataset="local:rows.jsonl", examples=7)
PARTS = [{"layers.0.heads": torch.eye(3)}, {"layers.1.heads": torch.ones(2, 2), "pooler": torch.zeros(1)}]


def numbered(number: int) -> Facts:
    return FACTS.model_copy(update={"seed": number})


def test_what_was_kept_comes_back_by_its_facts_alone(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        assert store.get(FACTS) is None
        written = store.put(FACTS, ORIGIN, PARTS)
        for found in (written, store.get(FACTS)):
            assert found is not None
            assert set(found) == {"layers.0.heads", "layers.1.heads", "pooler"}
            assert all(torch.equal(found[name], tensor) for part in PARTS for name, tensor in part.items())
        others: dict[str, object] = {
            "statistic": PARAMETER_FISHER,
            "checkpoint": "sha256:2",
            "rows": "3",
            "tokens": TOKENS.model_copy(update={"max_length": 64}),
            "precision": "bfloat16",
        }
        others |= {"estimator": "expected", "seed": 0, "population": 7, "paper": False}
        others |= {"settings": "4", "read_as": "ClassificationHead", "hardware": {"device": "cpu"}, "piece": "5"}
        assert set(others) == set(Facts.model_fields)
        for name, value in others.items():
            assert store.get(FACTS.model_copy(update={name: value})) is None, name
    assert [entry.name for entry in tmp_path.iterdir()] == [FACTS.address]


def test_what_fails_while_it_is_computed_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield PARTS[0]
        raise ValueError("a gradient is NaN")

    with StatisticsStore(tmp_path, 10**9) as store:
        with pytest.raises(ValueError, match="a gradient is NaN"):
            store.put(FACTS, ORIGIN, parts())
        assert store.get(FACTS) is None
    assert list(tmp_path.iterdir()) == []


def test_the_longest_unused_go_when_there_is_too_much_and_what_is_open_stays_readable(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10_000) as store:
        for number in range(3):
            store.put(numbered(number), ORIGIN, [{"x": torch.full((1000,), float(number))}])  # 4 kB each
            os.utime(tmp_path / numbered(number).address, (number, number))
        oldest = store.get(numbered(0))  # used now
        assert oldest is not None
        store.put(numbered(3), ORIGIN, [{"x": torch.zeros(1000)}])
        assert {number for number in range(4) if store.get(numbered(number))} == {0, 2, 3}
        store.put(numbered(4), ORIGIN, [{"x": torch.zeros(5000)}])
        store.put(numbered(5), ORIGIN, [{"x": torch.zeros(1)}])  # makes room first, of all that was there
        assert not (tmp_path / numbered(0).address).exists()
        assert torch.equal(oldest["x"], torch.zeros(1000))


@pytest.mark.parametrize("damage", ["other tensors", "other numbers", "other shapes"])
def test_an_entry_that_was_written_by_another_hand_counts_as_none(tmp_path: Path, damage: str) -> None:
    other = {"other tensors": {"x": torch.eye(3)}, "other numbers": {"layers.0.heads": torch.full((3, 3), torch.nan)}}
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, ORIGIN, PARTS)
        part = sorted((tmp_path / FACTS.address).glob("*.safetensors"))[0]
        save_file(other.get(damage, {"layers.0.heads": torch.eye(2)}), part)
        assert store.get(FACTS) is None


def test_a_folder_that_cannot_be_used_is_told_when_something_is_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with StatisticsStore(tmp_path / "file", 10**9) as store:
        assert store.get(FACTS) is None
        with pytest.raises(StorageError, match="cannot be used: Not a directory"):
            store.put(FACTS, ORIGIN, PARTS)


def test_a_damaged_entry_counts_as_none_and_is_replaced(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, ORIGIN, PARTS)
        part = next((tmp_path / FACTS.address).glob("*.safetensors"))
        part.write_bytes(part.read_bytes()[:-4])
        assert store.get(FACTS) is None
        store.put(FACTS, ORIGIN, PARTS)
        found = store.get(FACTS)
        assert found is not None
        assert torch.equal(found["layers.0.heads"], torch.eye(3))


def test_an_entry_that_lost_a_part_counts_as_none_and_is_replaced(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as store:
        for lost in ("00001.safetensors", "about.json"):
            store.put(FACTS, ORIGIN, PARTS)
            (tmp_path / FACTS.address / lost).unlink()
            with StatisticsStore(tmp_path, 10**9) as other:
                assert other.get(FACTS) is None
                assert len(other.put(FACTS, ORIGIN, PARTS)) == 3
                assert other.get(FACTS) is not None
    assert [entry.name for entry in tmp_path.iterdir()] == [FACTS.address]


@pytest.mark.parametrize("junk", ["file", "folder"])
def test_junk_under_an_address_is_replaced(tmp_path: Path, junk: str) -> None:
    entry = tmp_path / FACTS.address
    if junk == "file":
        entry.write_text("junk")
    else:
        (entry / "more").mkdir(parents=True)
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, ORIGIN, PARTS)
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
            store.put(FACTS, ORIGIN, [{"x": torch.zeros(10_000)}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, received)
    assert list(tmp_path.iterdir()) == []


def test_two_that_measure_the_same_at_once_leave_one_entry(tmp_path: Path) -> None:
    with StatisticsStore(tmp_path, 10**9) as one, StatisticsStore(tmp_path, 10**9) as other:
        first, second = one.put(FACTS, ORIGIN, PARTS), other.put(FACTS, ORIGIN, PARTS)
        assert torch.equal(first["layers.0.heads"], second["layers.0.heads"])
    assert [entry.name for entry in tmp_path.iterdir()] == [FACTS.address]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    for name, age in (("old", 7200.0), ("young", 60.0)):
        left = tmp_path / f"{ASSEMBLED}{name}"
        left.mkdir()
        (left / "00000.safetensors").write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    with StatisticsStore(tmp_path, 10**9) as store:
        store.put(FACTS, ORIGIN, PARTS)
    assert {entry.name for entry in tmp_path.iterdir()} == {f"{ASSEMBLED}young", FACTS.address}


# --- one computes, the others wait


def wanting(folder: Path, log: Path, until: int) -> "multiprocessing.process.BaseProcess":
    """A process that wants the statistic; while it computes it, it waits for `until` lines in the log."""
    process = multiprocessing.get_context("spawn").Process(target=want, args=(folder, log, until))
    process.start()
    return process


def want(folder: Path, log: Path, until: int) -> None:
    def parts() -> Iterator[dict[str, torch.Tensor]]:
        note(log, "computes")
        wait_until(lambda: len(log.read_text().splitlines()) >= until, "the others")
        time.sleep(2 * LOCK_POLL_S)
        yield from PARTS

    note(log, "wants")
    with StatisticsStore(folder, 10**9) as store:
        statistics, _ = store.get_or_compute(FACTS, ORIGIN, parts(), lambda: None)
        assert torch.equal(statistics["layers.0.heads"], torch.eye(3))


def note(log: Path, what: str) -> None:
    with log.open("a") as file:
        file.write(f"{what}\n")


def test_of_several_processes_one_computes_and_no_lock_is_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [wanting(tmp_path / "store", log, until=4) for _ in range(3)]
    for process in processes:
        process.join(HANGS_S)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(log.read_text().splitlines()) == ["computes", "wants", "wants", "wants"]
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [FACTS.address]


def test_when_the_process_that_computes_is_killed_another_takes_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = wanting(tmp_path / "store", log, until=1000)
    wait_until(lambda: log.exists() and "computes" in log.read_text(), "the first to compute")
    second = wanting(tmp_path / "store", log, until=0)
    wait_until(lambda: log.read_text().count("wants") == 2, "the second to want it")
    second.join(4 * LOCK_POLL_S)
    assert second.is_alive()
    assert log.read_text().count("computes") == 1
    first.kill()
    second.join(HANGS_S)
    assert second.exitcode == 0
    assert log.read_text().count("computes") == 2
    entries = sorted(entry.name for entry in (tmp_path / "store").iterdir())
    assert [name for name in entries if not name.startswith(ASSEMBLED)] == [FACTS.address]


def test_who_waits_may_be_told_to_stop_and_others_facts_wait_for_nobody(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with StatisticsStore(tmp_path, 10**9) as one, StatisticsStore(tmp_path, 10**9) as other:

        def parts() -> Iterator[dict[str, torch.Tensor]]:
            with pytest.raises(Stop):
                other.get_or_compute(FACTS, ORIGIN, PARTS, stop)
            assert other.get_or_compute(numbered(1), ORIGIN, PARTS, stop)[1] is False
            yield from PARTS

        assert one.get_or_compute(FACTS, ORIGIN, parts(), stop)[1] is False
        assert other.get_or_compute(FACTS, ORIGIN, PARTS, stop)[1] is True
    assert {entry.name for entry in tmp_path.iterdir()} == {FACTS.address, numbered(1).address}


def test_a_lock_that_fails_its_computation_is_free_again_and_one_of_the_dead_is_removed(tmp_path: Path) -> None:
    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield PARTS[0]
        raise ValueError("a gradient is NaN")

    (tmp_path / f"{LOCK}{'0' * 64}").touch()
    with StatisticsStore(tmp_path, 10**9) as store:
        with pytest.raises(ValueError, match="a gradient is NaN"):
            store.get_or_compute(FACTS, ORIGIN, parts(), lambda: None)
        assert list(tmp_path.iterdir()) == []
        assert store.get_or_compute(FACTS, ORIGIN, PARTS, lambda: None)[1] is False


def test_a_statistic_of_another_tenant_is_linked_by_its_facts_and_forgets_the_names_of_its_inputs(
    tmp_path: Path,
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with StatisticsStore(theirs, 10**9) as store:
        store.put(FACTS, ORIGIN, PARTS)
    with StatisticsStore(ours, 10**9, [tmp_path / "nobody", theirs]) as store:
        found = store.get(FACTS)
        assert found is not None
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for part in PARTS for name, tensor in part.items()
        }
        assert store.get(numbered(1)) is None
    for part in (ours / FACTS.address).glob("*.safetensors"):
        assert part.samefile(theirs / FACTS.address / part.name), "it takes no room"
    about = (ours / FACTS.address / ABOUT).read_text()
    assert ORIGIN.checkpoint not in about
    assert ORIGIN.dataset not in about
    shutil.rmtree(theirs)
    with StatisticsStore(ours, 10**9) as store:
        assert store.get(FACTS) is not None
