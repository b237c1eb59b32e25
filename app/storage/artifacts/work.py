"""The folders in which attempts assemble their artifacts, out of sight, whichever store publishes them."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.contracts.jobs import Attempt, Stage, TaskId
from app.storage.artifacts.store import artifact_name


class WorkFolders:
    """One folder for each attempt, named `<job>.<attempt>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_writable(self) -> bool:
        return self.folder.is_dir() and os.access(self.folder, os.W_OK)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def taken_bytes(self) -> int:
        taken: dict[tuple[int, int], int] = {}  # a file that is linked several times is there once
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # its attempt ends meanwhile
                found = path.lstat()
                taken[found.st_dev, found.st_ino] = found.st_blocks * 512
        return sum(taken.values())

    def begin(self, attempt: Attempt) -> Path:
        """Make an attempt's folder, and remove those of the job's earlier attempts."""
        self.remove_of_job(attempt.task.job)
        folder = self.of(attempt)
        folder.mkdir(parents=True)
        return folder

    def of(self, attempt: Attempt) -> Path:
        return self.folder / artifact_name(attempt)

    def discard(self, attempt: Attempt) -> None:
        shutil.rmtree(self.of(attempt), ignore_errors=True)

    def remove_of_job(self, job: str) -> None:
        for earlier in self.folder.glob(f"{job}.*"):
            shutil.rmtree(earlier, ignore_errors=True)

    def sweep(self, is_wanted: Callable[[TaskId, int], bool]) -> list[str]:
        """Remove the folders that nobody wants, and return their names."""
        removed = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            found = attempt_named(folder.name)
            if found is not None and not is_wanted(*found):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        return removed


def attempt_named(name: str) -> tuple[TaskId, int] | None:
    """Return the task and the attempt's number of a name that `artifact_name` made; None for any other."""
    job, dot, number = name.partition(".")
    return (TaskId(job=job, stage=Stage.MERGE), int(number)) if dot and number.isdigit() else None
