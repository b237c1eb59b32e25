"""Statistics kept for later merges, each under the digest of all that its content follows from."""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.engine.catalog.errors import DiskFull, StorageError
from worker.engine.checkpoints.reader import digest_file
from worker.engine.checkpoints.writer import save_tensors
from worker.engine.resources import is_out_of_memory

FORMAT = 2  # raise it when the same facts would give other numbers
ABOUT = "about.json"
ADDRESS = re.compile("[0-9a-f]{64}")
ASSEMBLED = ".assembled-"
ABANDONED_S = 3600.0  # a folder that nobody has written to for so long is of a process that was killed

Facts = Mapping[str, Any]
"""What a statistic was measured of and how, JSON; the same facts are the same statistic."""

logger = logging.getLogger(__name__)


class Statistics(Mapping[str, Tensor]):
    """Tensors of one kept statistic, each read from disk when it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for part in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(part, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class StatisticsStore:
    """A folder that several processes may share, while in context.

    Entries appear by one rename. Beyond `max_bytes` those that were used longest ago are removed; what is in use stays
    readable, since its files are open.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._stack = ExitStack()

    def __enter__(self) -> "StatisticsStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, facts: Facts) -> Statistics | None:
        """What was kept of these facts; None when there is nothing, or nothing readable."""
        entry = self.folder / address(facts)
        if not entry.exists():
            return None
        try:
            os.utime(entry)  # it was used now
            found = Statistics(entry, self._stack)  # opened first, so that what is checked is what will be read
            about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
            if _digests(entry) == about["sha256"]:
                return found
            problem = "its files are not those that were written"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            problem = str(error)  # removed this moment by another process, or damaged
        logger.warning("the statistic %s cannot be read and is measured again: %s", entry.name, problem)
        self._remove(entry)
        return None

    def put(self, facts: Facts, parts: Iterable[Mapping[str, Tensor]]) -> Statistics:
        """Keep tensors under the facts; each part is written before the next is asked for.

        Raises:
            DiskFull, StorageError: the folder has no room, or cannot be used.
        """
        assembled = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        try:
            assembled.mkdir(parents=True)
            self._tidy()
            for number, part in enumerate(parts):
                path = assembled / f"{number:05d}.safetensors"
                save_tensors(part, path, {"format": "pt"})
                _flush(path)
            kept = Statistics(assembled, self._stack)
            about = {"facts": facts, "sha256": _digests(assembled)}
            (assembled / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
            _flush(assembled / ABOUT)
            try:
                assembled.rename(self.folder / address(facts))
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                if self.get(facts) is None:  # what was there is no statistic, and gone now
                    assembled.rename(self.folder / address(facts))
                else:  # another process was as fast, and both are the same
                    shutil.rmtree(assembled)
        except OSError as error:
            shutil.rmtree(assembled, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("there is no space left for statistics; see MASKMERGE_MAX_STATISTICS_BYTES") from error
            raise StorageError(f"the folder of statistics cannot be used: {error.strerror}") from error
        except BaseException:
            shutil.rmtree(assembled, ignore_errors=True)
            raise
        return kept

    def _remove(self, entry: Path) -> None:
        """Out of sight first: a process that is killed meanwhile must not leave half of it under its address."""
        hidden = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        try:
            entry.rename(hidden)
        except OSError:  # another process was as fast, or nobody may: then it is found to be damaged each time
            return
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink()

    def _tidy(self) -> None:
        """Remove what killed processes left, and what was used longest ago while there is too much."""
        entries = []
        for entry in self.folder.iterdir():
            try:
                changed = entry.stat().st_mtime
                size = sum(file.stat().st_size for file in entry.iterdir())
            except OSError:  # removed this moment by another process
                continue
            if ADDRESS.fullmatch(entry.name):
                entries.append((changed, size, entry))
            elif entry.name.startswith(ASSEMBLED) and time.time() - changed > ABANDONED_S:
                shutil.rmtree(entry, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self._max_bytes:
                break
            self._remove(entry)
            total -= size


def address(facts: Facts) -> str:
    """sha256 of the facts, hex."""
    content = {"format": FORMAT, **facts}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digests(entry: Path) -> dict[str, str]:
    return {part.name: digest_file(part) for part in sorted(entry.glob("*.safetensors"))}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
