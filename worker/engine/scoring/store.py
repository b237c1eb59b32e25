"""Keeps statistics for later merges, each under the digest of everything that its content depends on."""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.engine.catalog.contracts.statistics import (
    ABOUT,
    ADDRESS,
    ASSEMBLED,
    NODE_SUMS,
    About,
    Facts,
    KeptFile,
    Origin,
)
from worker.engine.catalog.primitives.errors import DiskFull, StorageError
from worker.engine.checkpoints.reader import digest_file
from worker.engine.checkpoints.writer import save_tensors
from worker.engine.runtime.resources import is_out_of_memory

LOCK = ".lock-"
ABANDONED_S = 3600.0  # a folder that nobody has written to for so long was left by a killed process
LOCK_POLL_S = 0.2

logger = logging.getLogger(__name__)


class Statistics(Mapping[str, Tensor]):
    """The tensors of one kept statistic, each read from disk when it is asked for."""

    def __init__(self, folder: Path, about: About, stack: ExitStack) -> None:
        self.about = about
        self._files: dict[str, Any] = {}
        for part in _parts(folder):
            file = stack.enter_context(safe_open(part, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Common(Protocol):
    """Statistics of one tenant that machines have in common, beyond the folder of each.

    Every function raises StorageError where they cannot be had.
    """

    def holds(self, facts: Facts) -> bool:
        """Return whether there is a statistic with these facts, readable or not."""

    def about(self, facts: Facts) -> About | None:
        """Return what a statistic with these facts says of itself; None when there is none that says so."""

    def fetch(self, facts: Facts, folder: Path) -> bool:
        """Write a statistic with these facts into an empty folder; returns False when there is none that is whole."""

    def keep(self, facts: Facts, folder: Path, about: About) -> None:
        """Keep what a folder has, unless it is there, and let its last use be now."""

    def remove(self, each: Iterable[Facts]) -> None:
        """Remove statistics that nobody needs."""


class StatisticsStore:
    """A folder that several processes may share, while in context.

    Entries appear by one rename. Beyond `max_bytes` those that were used longest ago are removed. An entry in use stays
    readable, because its files are open.

    What was computed is used all the same, but not kept, where `may_keep` says so: a file that was written to since its
    digest was taken gives other numbers than the facts name, and they would be found by whoever has the digest's file.

    Args:
        others: folders of other tenants. An entry of theirs is linked when its facts are asked for: who knows them has
            the same inputs. It is found in no other way.
        common: what machines have in common. What the folder has not is fetched from there, and what is kept or used
            here is there too.
    """

    def __init__(self, folder: Path, max_bytes: int, others: Sequence[Path] = (), common: Common | None = None) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._others = others
        self._common = common
        self._stack = ExitStack()
        self.may_keep: Callable[[], bool] = lambda: True

    def __enter__(self) -> "StatisticsStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, facts: Facts) -> Statistics | None:
        """Return the statistic with these facts; None when there is none, or none that is readable."""
        return self._found(facts, self._stack, *self._others)

    def holds(self, facts: Facts) -> bool:
        """Return whether there is an entry with these facts here, or in common, readable or not."""
        return (self.folder / facts.address).exists() or (self._common is not None and self._common.holds(facts))

    def about(self, facts: Facts) -> About | None:
        """Return what an entry with these facts says of itself; None when there is none here that says so."""
        try:
            return About.model_validate_json((self.folder / facts.address / ABOUT).read_bytes())
        except (OSError, ValidationError):
            return None if self._common is None else self._common.about(facts)

    def read(self, facts: Facts) -> dict[str, Tensor] | None:
        """Return the tensors of an entry as `get` finds it, but in no other folder; nothing of it stays open."""
        with ExitStack() as stack:
            found = self._found(facts, stack)
            return None if found is None else dict(found)

    def remove(self, each: Iterable[Facts]) -> None:
        """Remove the entries with these facts, if there are any."""
        gone = list(each)
        for facts in gone:
            if (self.folder / facts.address).exists():
                self._remove(self.folder / facts.address)
        if self._common is not None:
            self._common.remove(gone)

    def _found(self, facts: Facts, stack: ExitStack, *others: Path) -> Statistics | None:
        entry = self.folder / facts.address
        found = self._opened(entry, stack) if entry.exists() or self._linked(facts, others) else None
        if self._common is None:
            return found
        if found is None and self._common.holds(facts) and self._fetched(facts, self._common):
            found = self._opened(entry, stack)
            if found is None:  # it is not what was kept, and would be fetched again
                self._common.remove([facts])
        if found is not None:
            self._common.keep(facts, entry, found.about)
        return found

    def _fetched(self, facts: Facts, common: Common) -> bool:
        """Bring an entry into the folder; returns False when there is none."""
        assembled = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        try:
            with _translated():
                assembled.mkdir(parents=True)
                self._tidy()
                if not common.fetch(facts, assembled):
                    return False
                with suppress(FileExistsError):  # another process has just fetched it too
                    _rename(assembled, self.folder / facts.address)
            return True
        finally:
            shutil.rmtree(assembled, ignore_errors=True)

    def _opened(self, entry: Path, stack: ExitStack) -> Statistics | None:
        try:
            os.utime(entry)  # it was used now
            about = About.model_validate_json((entry / ABOUT).read_bytes())
            found = Statistics(entry, about, stack)  # opened before it is checked: the same files are read
            if _files(entry) == about.files:
                return found
            problem = "its files are not those that were written"
        except (SafetensorError, OSError, ValidationError) as error:
            problem = str(error)  # another process has just removed it, or it is damaged
        logger.warning("the statistic %s cannot be read and is measured again: %s", entry.name, problem)
        self._remove(entry)
        return None

    def get_or_compute(
        self, facts: Facts, origin: Origin, parts: Iterable[Mapping[str, Tensor]], on_wait: Callable[[], None]
    ) -> tuple[Statistics, bool]:
        """Return the statistic with these facts, and whether it was kept; otherwise `parts` are computed and kept.

        If several processes need the same statistic, one computes it and the others wait. One of them takes over when
        it ends without a result.

        Args:
            parts: the statistic's parts, which are only computed when they are iterated over.
            on_wait: called several times a second while another process computes; may raise to stop.

        Raises:
            DiskFull, StorageError: the folder has no room, or cannot be used.
        """
        found = self.get(facts)
        if found is not None:
            return found, True
        with self.alone_with(facts, on_wait):
            found = self.get(facts)
            if found is not None:
                return found, True
            return self.put(facts, origin, parts), False

    @contextmanager
    def alone_with(self, facts: Facts, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other processes with the same facts out while in context. The kernel frees the lock of one that dies.

        Args:
            on_wait: called several times a second while another process is inside; may raise to stop.

        Raises:
            StorageError: the folder cannot be used.
        """
        with _translated():
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{LOCK}{facts.address}"
        while True:
            with _translated():
                descriptor = _try_lock(lock)
            if descriptor is not None:
                break
            on_wait()
            time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            _unlock(lock, descriptor)

    def put(self, facts: Facts, origin: Origin, parts: Iterable[Mapping[str, Tensor]]) -> Statistics:
        """Keep tensors under the facts; each part is written before the next is asked for.

        Raises:
            DiskFull, StorageError: the folder has no room, or cannot be used.
        """
        assembled = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        try:
            with _translated():
                return self._put(assembled, facts, origin, parts)
        except BaseException:
            shutil.rmtree(assembled, ignore_errors=True)
            raise

    def _put(self, assembled: Path, facts: Facts, origin: Origin, parts: Iterable[Mapping[str, Tensor]]) -> Statistics:
        assembled.mkdir(parents=True)
        self._tidy()
        for number, part in enumerate(parts):
            path = assembled / f"{number:05d}.safetensors"
            save_tensors(part, path, {"format": "pt"})
            _flush(path)
        about = About(facts=facts, origin=origin, files=_files(assembled), created_at=datetime.now(UTC))
        kept = Statistics(assembled, about, self._stack)
        if not self.may_keep():
            logger.warning("%s of %s is not kept: files were changed meanwhile", facts.statistic, origin.checkpoint)
            shutil.rmtree(assembled)  # its files are open
            return kept
        (assembled / ABOUT).write_text(about.model_dump_json(indent=1), encoding="utf-8")
        _flush(assembled / ABOUT)
        entry = self.folder / facts.address
        try:
            _rename(assembled, entry)
        except FileExistsError:
            there = self._opened(entry, self._stack)
            if there is None:  # the entry was no readable statistic, and is removed now
                assembled.rename(entry)
            else:  # another process has just kept the same statistic
                shutil.rmtree(assembled)
                about = there.about
        if self._common is not None:
            self._common.keep(facts, entry, about)
            if facts.statistic == NODE_SUMS:  # whoever goes on with the job finds and removes them in common
                self._remove(entry)
        return kept

    def _linked(self, facts: Facts, others: Sequence[Path]) -> bool:
        """Link another tenant's statistic with these facts; it does not say by which names its inputs went there."""
        for folder in others:
            source, assembled = folder / facts.address, self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
            try:
                about = About.model_validate_json((source / ABOUT).read_bytes())
                assembled.mkdir(parents=True)
                for part in _parts(source):
                    os.link(part, assembled / part.name)
                own = about.for_another_tenant()
                (assembled / ABOUT).write_text(own.model_dump_json(indent=1), encoding="utf-8")
                _flush(assembled / ABOUT)
                assembled.rename(self.folder / facts.address)
                return True
            except (OSError, ValidationError):  # it is not there, or it was removed or linked meanwhile
                shutil.rmtree(assembled, ignore_errors=True)
        return False

    def _remove(self, entry: Path) -> None:
        """Rename an entry, then remove it: a process that is killed meanwhile must not leave half of it there."""
        hidden = self.folder / f"{ASSEMBLED}{secrets.token_hex(8)}"
        try:
            entry.rename(hidden)
        except OSError:  # another process has removed it; or nobody may, and it is found to be damaged each time
            return
        if hidden.is_dir():
            shutil.rmtree(hidden, ignore_errors=True)
        else:
            hidden.unlink()

    def _tidy(self) -> None:
        """Remove files that killed processes left, and the entries used longest ago while there is too much."""
        entries = []
        for entry in self.folder.iterdir():
            if entry.name.startswith(LOCK):
                _remove_free_lock(entry)
                continue
            try:
                changed = entry.stat().st_mtime
                size = sum(file.stat().st_size for file in entry.iterdir())
            except OSError:  # another process has just removed it
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


def _rename(assembled: Path, entry: Path) -> None:
    """Let an assembled entry appear. Raises FileExistsError where there is one."""
    try:
        assembled.rename(entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(entry) from error


def _parts(entry: Path) -> list[Path]:
    return sorted(entry.glob("*.safetensors"))


def _files(entry: Path) -> list[KeptFile]:
    return [KeptFile(name=part.name, bytes=part.stat().st_size, sha256=digest_file(part)) for part in _parts(entry)]


def _try_lock(lock: Path) -> int | None:
    """Return a descriptor that holds the lock; None while another one does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it after it was opened here


def _unlock(lock: Path, descriptor: int) -> None:
    """Remove the lock, then free it: a process that has opened it finds that the name is no longer that file's."""
    lock.unlink(missing_ok=True)
    os.close(descriptor)


def _remove_free_lock(lock: Path) -> None:
    """Remove a lock that a killed process left."""
    with suppress(OSError):
        descriptor = _try_lock(lock)
        if descriptor is not None:
            _unlock(lock, descriptor)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn errors of the file system into errors of the engine."""
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("there is no space left for statistics; see MASKMERGE_MAX_STATISTICS_BYTES") from error
        raise StorageError(f"the folder of statistics cannot be used: {error.strerror}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
