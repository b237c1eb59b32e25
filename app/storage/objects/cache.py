"""Copies of objects on this machine, which several processes share.

An entry is a folder named after what was listed: bucket, keys, sizes and ETags. So an object that changes is another
entry. Who reads an entry holds a shared lock (`flock`) on its folder, who fills or removes one an exclusive lock; the
kernel frees the locks of a process that dies. Beyond the room that a setting gives, entries that nobody holds are
removed, those that were used longest ago first.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from app.contracts.object_storage import ObjectStorage
from app.storage.inputs import OnBytes, RootedPath
from app.storage.objects.bucket import AT_WORK, Bucket, StoredObject

FOLDER = "cache/objects"
"""Folder of the entries, within the data folder."""
COMPLETE = ".complete"
FILES = "files"
POLL_S = 0.2
ABANDONED_S = 3600.0

logger = logging.getLogger(__name__)


class ObjectCache:
    """Keeps copies below the data folder.

    Args:
        held: stack whose end lets go of every entry that was fetched.
    """

    def __init__(self, data_dir: Path, settings: ObjectStorage, held: ExitStack) -> None:
        self._folder = data_dir.resolve() / FOLDER
        self._settings = settings
        self._held = held

    def fetch(self, bucket: str, objects: Mapping[str, StoredObject], on_bytes: OnBytes) -> RootedPath:
        """Return a folder with copies of objects, by the names given. It stays until `held` is closed.

        Raises: as `Bucket.download`.
        """
        entry = self._folder / _address(self._settings.endpoint, bucket, objects)
        total = sum(one.size for one in objects.values())

        def wait() -> None:
            on_bytes(0, total)
            time.sleep(POLL_S)

        while True:
            descriptor = self._locked(entry, fcntl.LOCK_SH, wait)
            if (entry / COMPLETE).exists():
                os.utime(entry)  # it was used now
                self._held.callback(os.close, descriptor)
                return RootedPath(entry / FILES, entry / FILES)
            os.close(descriptor)
            descriptor = self._locked(entry, fcntl.LOCK_EX, wait)
            try:
                if not (entry / COMPLETE).exists():
                    self.make_room(total)
                    wanted = {entry / FILES / name: one for name, one in objects.items()}
                    Bucket(bucket, self._settings, AT_WORK).download(wanted, on_bytes)
                    (entry / COMPLETE).touch()
            finally:
                os.close(descriptor)

    def make_room(self, wanted: int = 0) -> None:
        """Remove entries that nobody reads until there is room for so many bytes more, and what was left unfinished."""
        found = []
        for entry in self._folder.iterdir() if self._folder.is_dir() else ():
            with suppress(OSError):  # another process removes it
                size = sum(file.stat().st_blocks * 512 for file in entry.rglob("*"))
                found.append((entry.stat().st_mtime, size, entry))
        total = sum(size for _, size, _ in found) + wanted
        for used, size, entry in sorted(found):
            is_left = not (entry / COMPLETE).exists() and time.time() - used > ABANDONED_S
            if (is_left or total > self._settings.max_cache_bytes) and _removed(entry):
                total -= size

    def _locked(self, entry: Path, kind: int, wait: Callable[[], None]) -> int:
        """Return a descriptor that holds a lock on the entry's folder, which is made if it is not there."""
        while True:
            (entry / FILES).mkdir(parents=True, exist_ok=True)
            descriptor = _lock(entry, kind)
            if descriptor is not None:
                return descriptor
            wait()


def _lock(entry: Path, kind: int) -> int | None:
    """Return a descriptor that holds a lock on a folder; None while others hold it, or when it was removed."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), entry.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _removed(entry: Path) -> bool:
    """Remove an entry unless it is in use; returns whether it is gone."""
    descriptor = _lock(entry, fcntl.LOCK_EX)
    if descriptor is None:
        return False
    try:
        (entry / COMPLETE).unlink(missing_ok=True)  # whenever this process ends, nobody takes the rest for whole
        shutil.rmtree(entry, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def _address(endpoint: str | None, bucket: str, objects: Mapping[str, StoredObject]) -> str:
    digest = hashlib.sha256(f"{endpoint}\n{bucket}\n".encode())
    for name, one in sorted(objects.items()):
        digest.update(f"{name}\n{one.key}\n{one.size} {one.etag}\n".encode())
    return digest.hexdigest()
