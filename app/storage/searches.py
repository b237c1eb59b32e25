"""Keeps the trials of `auto` in the data folder, from one attempt of a job to the next."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from app.contracts.jobs import Attempt

logger = logging.getLogger(__name__)


class SearchFolder:
    """Keeps journals, `searches/<job>.<attempt>.jsonl`, each with every trial up to that attempt; the last one counts.

    An attempt goes on with a copy of the journal before it, so that an engine that does not know yet that its lease is
    lost writes where nobody reads.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir.resolve() / "searches"

    def begin(self, attempt: Attempt) -> Path:
        """Make the attempt's journal with the trials of earlier attempts. Raises OSError when it cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{attempt.task.job}.{attempt.number}.jsonl"
        journals = self._folder.glob(f"{attempt.task.job}.*.jsonl")
        earlier = sorted((file for file in journals if _number(file) < attempt.number), key=_number)
        if earlier:
            unfinished = path.with_suffix(".part")
            shutil.copyfile(earlier[-1], unfinished)
            unfinished.replace(path)
        for file in earlier:
            file.unlink(missing_ok=True)
        return path

    def remove(self, job: str) -> None:
        """Forget the trials of a job."""
        for file in self._folder.glob(f"{job}.*"):
            file.unlink(missing_ok=True)

    def sweep(self, is_wanted: Callable[[str], bool]) -> int:
        """Remove the journals of the jobs for which `is_wanted` is False, and return how many there were."""
        removed = 0
        for file in self._folder.glob("*.*"):
            if not is_wanted(file.name.partition(".")[0]):
                logger.info("removing %s, left by a job that needs it no more", file.name)
                file.unlink(missing_ok=True)
                removed += 1
        return removed


def _number(journal: Path) -> int:
    return int(journal.name.split(".")[1])
