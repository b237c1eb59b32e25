"""Compares the memory and disk space that are left with a job's needs, before any work is spent on it."""

import resource
import shutil
from pathlib import Path

import torch

from worker.engine.catalog.primitives.errors import DiskFull, OutOfMemory

# For each version of control groups: its folder, and its limit, its usage, and the part of the usage that can be freed.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Messages of PyTorch, oneDNN, C++ and the system when an allocation fails; the exceptions have no class of their own.
OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "bad_alloc", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, OSError | RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def require_memory(needed_bytes: int) -> None:
    """Raise OutOfMemory with both figures when the job needs more memory than there is."""
    available = available_memory()
    if needed_bytes > available:
        raise OutOfMemory(
            f"the job needs about {megabytes(needed_bytes)}, this worker has {megabytes(available)}; use fewer or "
            "smaller models, shorter rows (max_length), or a worker with more memory",
            needed_bytes=needed_bytes,
            available_bytes=available,
        )


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFull with both figures when the disk of `folder` has no room for `what`."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DiskFull(
            f"{what} needs {megabytes(needed_bytes)}, its disk has room for {megabytes(free)}",
            needed_bytes=needed_bytes,
            available_bytes=free,
        )


def available_memory() -> int:
    """Return the bytes that this process may hold: those that it holds, and those that machine and limits have left."""
    status = _fields(Path("/proc/self/status"))
    left = [_fields(Path("/proc/meminfo"))["MemAvailable"]]
    left += [bytes_left for group in CGROUPS if (bytes_left := cgroup_left(*group)) is not None]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        left.append(address_space - status["VmSize"])
    return status["VmRSS"] + min(left)


def cgroup_left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Return the bytes that a control group has left; None where there is no such group, or no limit.

    Its usage counts pages of files that were read or written, which the kernel gives up before it runs short.
    """
    try:
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - used + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):  # another version of control groups, or "max"
        return None


def _fields(file: Path) -> dict[str, int]:
    """Return the bytes of the lines that end in kB, by name."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def megabytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{max(count, 0) / 1e6:,.0f} MB"
