"""Statistics kept for later merges, each under the digest of all that its content follows from."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1  # raise it when the same facts would give other numbers
ABOUT = "about.json"
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
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "StatisticsStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, facts: Facts) -> Statistics | None:
        """What was kept of these facts; None when there is nothing, or nothing readable."""
        entry = self.folder / address(facts)
        if not (entry / ABOUT).exists():
            return None
        try:
            os.utime(entry)  # it was used now
            return Statistics(entry, self._stack)
        except (SafetensorError, OSError) as error:  # removed this moment by another process, or damaged
            logger.warning("the statistic %s cannot be read and is measured again: %s", entry.name, error)
            shutil.rmtree(entry, ignore_errors=True)
            return None

    def put(self, facts: Facts, parts: Iterable[Mapping[str, Tensor]]) -> Statistics:
        """Keep tensors under the facts; each part is written before the next is asked for."""
        self._tidy()
        assembled = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        assembled.mkdir()
        try:
            for number, part in enumerate(parts):
                path = assembled / f"{number:05d}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in part.items()}, path, {"format": "pt"})
                path.chmod(0o644)  # the library makes files that only their owner reads
                _flush(path)
            (assembled / ABOUT).write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
            _flush(assembled / ABOUT)
            kept = Statistics(assembled, self._stack)
            try:
                assembled.rename(self.folder / address(facts))
            except OSError:  # another process was as fast; both are the same
                shutil.rmtree(assembled)
        except BaseException:
            shutil.rmtree(assembled, ignore_errors=True)
            raise
        return kept

    def _tidy(self) -> None:
        """Remove what killed processes left, and what was used longest ago while there is too much."""
        entries = []
        for entry in self.folder.iterdir():
            try:
                changed = entry.stat().st_mtime
                size = sum(file.stat().st_size for file in entry.iterdir())
            except OSError:  # removed this moment by another process
                continue
            if not entry.name.startswith(ASSEMBLED):
                entries.append((changed, size, entry))
            elif time.time() - changed > ABANDONED_S:
                shutil.rmtree(entry, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self._max_bytes:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def address(facts: Facts) -> str:
    """sha256 of the facts, hex."""
    content = {"format": FORMAT, **facts}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
