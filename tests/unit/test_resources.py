"""What a machine has left, from the figures that the system gives."""

from pathlib import Path

import pytest
import torch

from worker.engine.catalog.primitives.errors import DiskFull, OutOfMemory
from worker.engine.runtime.resources import (
    CGROUPS,
    available_memory,
    cgroup_left,
    is_out_of_memory,
    require_memory,
    require_space,
)


@pytest.mark.parametrize("version", CGROUPS, ids=["v2", "v1"])
def test_pages_of_files_count_as_left_in_a_control_group(tmp_path: Path, version: tuple[Path, str, str, str]) -> None:
    _, limit, usage, reclaimable = version
    (tmp_path / limit).write_text("4000000000\n")
    (tmp_path / usage).write_text("3900000000\n")
    (tmp_path / "memory.stat").write_text(f"anon 900000000\n{reclaimable} 3000000000\n")
    assert cgroup_left(tmp_path, limit, usage, reclaimable) == 3_100_000_000
    (tmp_path / limit).write_text("max\n")
    assert cgroup_left(tmp_path, limit, usage, reclaimable) is None
    assert cgroup_left(tmp_path / "none", limit, usage, reclaimable) is None


def test_what_is_left_is_more_than_what_is_held_and_bounds_what_may_be_asked(tmp_path: Path) -> None:
    available = available_memory()
    assert available > 100_000_000
    require_memory(available // 2)
    with pytest.raises(OutOfMemory, match="the job needs about"):
        require_memory(available * 100)
    require_space(tmp_path, 1, "the artifact")
    with pytest.raises(DiskFull, match="the artifact needs"):
        require_space(tmp_path, 2**62, "the artifact")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            True,
        ),
        (RuntimeError("could not create a primitive"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ValueError("can't allocate memory"), False),
        (RuntimeError("size mismatch"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_want_of_memory_is_known_in_whatever_exception_it_comes(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
