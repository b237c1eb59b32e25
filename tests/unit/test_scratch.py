"""Temporary files of processes that were killed do not stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.storage import scratch
from app.storage.scratch import Scratch

HOLD = "import sys; from app.storage.scratch import Scratch; print(Scratch().path, flush=True); sys.stdin.read()"


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(parent)},
        )
        for _ in range(2)
    ]
    folders = []
    for process in processes:
        assert process.stdout is not None
        folders.append(Path(process.stdout.readline().strip()))
        (folders[-1] / "large").write_bytes(b"x")
    processes[0].kill()
    processes[0].wait()
    Scratch().remove()
    assert all(folder.exists() for folder in folders)  # it is young: another process may be about to lock it
    monkeypatch.setattr(scratch, "YOUNG_S", 0.0)
    own = Scratch()
    assert [folder.exists() for folder in folders] == [False, True]
    own.remove()
    own.remove()
    assert not own.path.exists()
    processes[1].kill()
    for process in processes:
        process.communicate()
