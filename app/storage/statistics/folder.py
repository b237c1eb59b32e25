"""Finds the statistics that workers keep in the data folder."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from os import DirEntry, fstat, scandir, stat_result
from pathlib import Path

from pydantic import ValidationError

from app.contracts.api_keys import DEFAULT_TENANT
from app.storage.files import LocalFile
from app.storage.statistics.kept import KeptStatistic, in_order
from app.storage.tenants import statistics_of, statistics_of_others
from worker.engine.catalog.contracts.statistics import ABOUT, ADDRESS, ASSEMBLED, NODE_SUMS, About


@dataclass(frozen=True)
class StatisticInFolder(KeptStatistic):
    state: tuple[int, int]
    """Inode and time of change of its folder. A folder that takes its place may have the same inode, but not both."""
    path: Path

    def open(self) -> tuple[list[LocalFile], ExitStack]:
        """Open its files, which stay readable even when the statistic is removed meanwhile."""
        files = []
        with ExitStack() as opened:
            for name, file in zip(self.names, self.about.files, strict=True):
                stream = opened.enter_context((self.path / file.name).open("rb"))
                if fstat(stream.fileno()).st_size != file.bytes:  # damaged; who needs it measures it again
                    raise FileNotFoundError(self.path / file.name)
                files.append(LocalFile(name, file.bytes, file.sha256, Path(f"/proc/self/fd/{stream.fileno()}")))
            return files, opened.pop_all()

    def used_at(self) -> datetime | None:
        try:
            return datetime.fromtimestamp(self.path.stat().st_mtime, UTC)
        except FileNotFoundError:
            return None


class StatisticsFolder:
    """Lists the statistics in a folder. The content of an address never changes, so each entry is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, StatisticInFolder] = {}

    def newest(self, after: str | None = None) -> Iterator[KeptStatistic]:
        found = {entry.name: kept for entry in self._entries() if (kept := self._kept(entry)) is not None}
        self._known = found
        yield from in_order([*found.values()], after)

    def get(self, address: str) -> StatisticInFolder:
        path = self._folder / address
        kept = _read(path, _state(path.stat()))
        if kept is None:
            raise FileNotFoundError(path)
        return kept

    def _entries(self) -> list[DirEntry[str]]:
        try:
            with scandir(self._folder) as entries:
                return [entry for entry in entries if ADDRESS.fullmatch(entry.name)]
        except FileNotFoundError:  # nothing was ever kept
            return []

    def _kept(self, entry: DirEntry[str]) -> StatisticInFolder | None:
        known = self._known.get(entry.name)
        try:
            state = _state(entry.stat())
        except FileNotFoundError:
            return None
        if known is not None and known.state == state:
            return known
        return _read(Path(entry.path), state)


class StatisticsFolders:
    """The statistics of each tenant."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._known: dict[str, StatisticsFolder] = {}

    def make_room(self, wanted: int) -> bool:
        """Remove the statistics that were used longest ago, until as many bytes are free.

        Returns False, and removes nothing, where all together do not take as many. Who reads one goes on reading it.
        """
        entries: dict[str, list[Path]] = {}
        for folder in (
            statistics_of(self._data_dir, DEFAULT_TENANT),
            *statistics_of_others(self._data_dir, DEFAULT_TENANT),
        ):
            for entry in folder.glob("*"):
                if ADDRESS.fullmatch(entry.name):
                    entries.setdefault(entry.name, []).append(entry)
        found = sorted(filter(None, (_taken(address, paths) for address, paths in entries.items())))
        if sum(size for _, size, _ in found) < wanted:
            return False
        for _, size, address in found:
            if wanted <= 0:
                break
            for entry in entries[address]:
                hidden = entry.with_name(f"{ASSEMBLED}{secrets.token_hex(8)}")
                with suppress(OSError):  # a worker has removed it
                    entry.rename(hidden)  # so that nobody sees half of it, whenever this process ends
                    shutil.rmtree(hidden, ignore_errors=True)
            wanted -= size
        return True

    def of(self, tenant: str) -> StatisticsFolder:
        return self._known.setdefault(tenant, StatisticsFolder(statistics_of(self._data_dir, tenant)))


def _taken(address: str, entries: list[Path]) -> tuple[float, int, str] | None:
    """Return when a statistic was last used, its bytes, which tenants share, and its address; None when it is gone."""
    try:
        sizes = [sum(file.stat().st_blocks * 512 for file in entry.iterdir()) for entry in entries]
        return max(entry.stat().st_mtime for entry in entries), max(sizes), address
    except OSError:
        return None


def _state(stat: stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_ctime_ns


def _read(path: Path, state: tuple[int, int]) -> StatisticInFolder | None:
    """Read an entry; None when it is gone, is a part of one to come, or a worker of another version wrote it."""
    try:
        about = About.model_validate_json((path / ABOUT).read_bytes())
    except (OSError, ValidationError):
        return None
    return None if about.facts.statistic == NODE_SUMS else StatisticInFolder(path.name, about, state, path)
