"""Digests of checkpoints: computed once while the files stay what they are, and never of what they were."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.tiny import edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.checkpoints import reader
from worker.engine.checkpoints.reader import CLOCK_TICK_NS, Digests, digest_file

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written long enough ago to be remembered: clocks are not waited for, "long enough" is made short."""
    monkeypatch.setattr(reader, "CLOCK_TICK_NS", -CLOCK_TICK_NS)
    return tiny_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return digest_file(path)

    monkeypatch.setattr(reader, "digest_file", digest)
    return names


def test_the_digest_is_of_names_and_digests_of_config_and_weights(checkpoint: Path) -> None:
    lines = [
        f"{name}\0{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}\n" for name in ("config.json", WEIGHTS)
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert Digests().of_checkpoint(inspect_checkpoint(checkpoint, "x")) == f"sha256:{expected}"


def test_files_that_stay_as_they_are_are_read_once(checkpoint: Path, read: list[str]) -> None:
    digests = Digests()
    info = inspect_checkpoint(checkpoint, "x")
    assert digests.of_checkpoint(info) == digests.of_checkpoint(info) == digests.of_checkpoint(info)
    assert read == ["config.json", WEIGHTS]


def test_a_changed_file_alone_is_read_again(checkpoint: Path, read: list[str]) -> None:
    digests = Digests()
    before = digests.of_checkpoint(inspect_checkpoint(checkpoint, "x"))
    edit_json(checkpoint / "config.json", id2label={"0": "no", "1": "yes"})
    changed = inspect_checkpoint(checkpoint, "x")
    assert digests.of_checkpoint(changed) == Digests().of_checkpoint(changed) != before
    assert read[:3] == ["config.json", WEIGHTS, "config.json"]


def test_other_bytes_of_the_same_size_with_the_old_time_of_change_are_noticed(checkpoint: Path) -> None:
    """Whoever copies with times kept gives a file the modification time of another; its inode's own time tells."""
    digests = Digests()
    info = inspect_checkpoint(checkpoint, "x")
    before = digests.of_checkpoint(info)
    file = checkpoint / WEIGHTS
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert digests.of_checkpoint(info) == Digests().of_checkpoint(info) != before


def test_another_file_in_its_place_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    digests = Digests()
    info = inspect_checkpoint(checkpoint, "x")
    before = digests.of_checkpoint(info)
    other = tiny_checkpoint(tmp_path / "other", seed=1) / WEIGHTS
    shutil.copystat(checkpoint / WEIGHTS, other)
    other.replace(checkpoint / WEIGHTS)
    assert digests.of_checkpoint(info) == Digests().of_checkpoint(info) != before


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    """Written again within one tick of the file system's clock, it might have the same times."""
    info = inspect_checkpoint(tiny_checkpoint(tmp_path / "checkpoint"), "x")
    later = time.time_ns() + 3600 * CLOCK_TICK_NS
    for name in ("config.json", WEIGHTS):
        os.utime(tmp_path / "checkpoint" / name, ns=(later, later))  # of a clock that is an hour ahead
    digests = Digests()
    assert digests.of_checkpoint(info) == digests.of_checkpoint(info)
    assert read == ["config.json", WEIGHTS] * 2


def test_several_at_once_have_the_digests_of_each_alone(tmp_path: Path, read: list[str]) -> None:
    folders = [tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(3)]
    infos = [inspect_checkpoint(folder, "x") for folder in (*folders, folders[0])]
    together = Digests().of_checkpoints(infos, threads=2)
    assert sorted(read) == sorted(["config.json", WEIGHTS] * 3), "a file that is named twice is read once"
    assert together == [Digests().of_checkpoint(info) for info in infos]
    assert len(set(together)) == 3
