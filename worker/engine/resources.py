"""What this machine has left for a job, compared with what the job needs before any work is spent on it."""

import resource
import shutil
from pathlib import Path

from worker.engine.catalog.errors import DiskFull, OutOfMemory

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def require_memory(needed_bytes: int) -> None:
    """Raises OutOfMemory with both figures when the job needs more than there is."""
    available = available_memory()
    if needed_bytes > available:
        raise OutOfMemory(
            f"the job needs about {_megabytes(needed_bytes)}, this worker has {_megabytes(available)}; use fewer or "
            "smaller models, shorter rows (max_length), or a worker with more memory",
            needed_bytes=needed_bytes,
            available_bytes=available,
        )


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises DiskFull with both figures when the disk of `folder` has no room for `what`."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DiskFull(
            f"{what} needs {_megabytes(needed_bytes)}, its disk has room for {_megabytes(free)}",
            needed_bytes=needed_bytes,
            available_bytes=free,
        )


def available_memory() -> int:
    """Bytes that this process may hold: what it holds now and what machine, control group and limits have left."""
    status = _fields(Path("/proc/self/status"))
    left = [_fields(Path("/proc/meminfo"))["MemAvailable"]]
    for limit, usage in CGROUPS:
        try:
            left.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        left.append(address_space - status["VmSize"])
    return status["VmRSS"] + min(left)


def _fields(file: Path) -> dict[str, int]:
    """Bytes by name, of the lines that end in kB."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _megabytes(count: int) -> str:
    return f"{max(count, 0) / 1e6:,.0f} MB"
