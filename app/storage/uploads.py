"""Keeps what tenants upload: files, and folders made of them, each below the SHA-256 of its bytes.

`uploads/<sha256>/` of a tenant holds `about.json`, which says what was announced, and `part/` while bytes arrive, which
is renamed to `content/` once all are there and were checked. So the size of the file in `part/` is how much is there,
also after a crash, and nothing reads a file that is not whole. The folder's time of change is that of its last use.

Whoever changes an upload holds a lock (`flock`) on its folder, which the kernel releases when its process dies.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from app.contracts.uploads import PARQUET, Kind, UploadStatus, group
from app.storage.inputs import RootedPath
from app.storage.tenants import uploads_of, uploads_of_all

ABOUT = "about.json"
PART = "part"
CONTENT = "content"
MANIFEST = "manifest.json"
REMOVED = ".removed-"
SMALLEST_BYTES = 4096  # a file takes a block of the disk, however small it is
BEGINNING_BYTES = 16
PATIENCE_S = 2.0  # a complete upload is held for moments only
TICK_S = 0.01
PARQUET_MARK = b"PAR1"
STRANGERS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
"""Bytes with which archives, as torch.save writes them, and pickles begin. No text and no tokenizer file does."""
ADDRESS = re.compile(r"[0-9a-f]{64}")

InUse = Callable[[], Collection[tuple[str, str]]]
"""Returns (tenant, sha256) of each upload that active jobs read."""

logger = logging.getLogger(__name__)


class UploadRefused(Exception):
    """What arrived is not what was announced, or may not be kept; the message says why."""


class UploadBusy(Exception):
    """Another request sends this upload, or removes it."""


class About(BaseModel):
    """What was announced of an upload with its first byte."""

    kind: Kind
    name: str | None
    bytes: int

    @property
    def file(self) -> str:
        """Name of the one file in `part/`."""
        return MANIFEST if self.name is None else self.name


@dataclass(frozen=True)
class Upload:
    """An upload as it is on disk."""

    sha256: str
    folder: Path
    about: About
    complete: bool
    received: int
    used: float
    """Time of its last use, in seconds since 1970."""

    def status(self, retention_s: float) -> UploadStatus:
        return UploadStatus(
            sha256=self.sha256,
            kind=self.about.kind,
            name=self.about.name,
            bytes=self.about.bytes,
            received_bytes=self.received,
            complete=self.complete,
            expires_at=datetime.fromtimestamp(self.used + retention_s, UTC),
            reference=f"upload:{self.sha256}",
        )


class TenantUploads:
    """The uploads of one tenant.

    Args:
        folder: the tenant's own, see `uploads_of`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, sha256: str) -> Upload | None:
        """Return an upload, complete or not; None where nothing of it is there."""
        folder = self._folder / sha256
        try:
            used = folder.stat().st_mtime
            about = About.model_validate_json((folder / ABOUT).read_bytes())
            complete = (folder / CONTENT).is_dir()
            received = about.bytes if complete else (folder / PART / about.file).stat().st_size
        except (OSError, ValidationError):  # it is gone, or a crash came between its folder and its first byte
            return None
        return Upload(sha256, folder, about, complete, received, used)

    def all(self) -> Iterator[Upload]:
        """Yield every upload, complete or not, by address."""
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._folder)):
                found = self.find(name) if ADDRESS.fullmatch(name) else None
                if found is not None:
                    yield found

    def stored_bytes(self) -> int:
        """Return the room that the tenant's uploads take. Those that are not complete count as they were announced, and
        a file that is in folders too, once."""
        files: dict[int, int] = {}
        announced = 0
        for upload in self.all():
            if not upload.complete:
                announced += max(SMALLEST_BYTES, upload.about.bytes)
                continue
            for path in (upload.folder / CONTENT).rglob("*"):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        stat = path.stat()
                        files[stat.st_ino] = max(SMALLEST_BYTES, stat.st_size)
        return announced + sum(files.values())

    def missing_bytes(self) -> int:
        """Return the bytes that were announced and are not there yet."""
        missing = 0
        with suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                # Most uploads are complete, and of these this alone is looked at.
                found = self.find(name) if ADDRESS.fullmatch(name) and (self._folder / name / PART).is_dir() else None
                if found is not None:
                    missing += max(0, found.about.bytes - found.received)
        return missing

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Wait until no other request of the tenant is between a look at the room and an upload that takes some of it.

        Raises OSError when the disk is full, or cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, sha256: str, about: About, *, anew: bool) -> Iterator["Writer"]:
        """Hold an upload to write to it, and make it if it is new.

        Args:
            anew: whether bytes that are there already are dropped.

        Raises:
            UploadBusy: another request holds it.
            OSError: the disk is full, or cannot be written.
        """
        folder = self._folder / sha256
        with ExitStack() as held:
            for _ in range(2):  # it may be removed between being made and being held
                folder.mkdir(parents=True, exist_ok=True)
                if _hold(folder, held):
                    break
            else:
                raise UploadBusy
            found = self.find(sha256)
            if found is None or (anew and not found.complete):
                shutil.rmtree(folder / PART, ignore_errors=True)
                _write(folder / ABOUT, about.model_dump_json().encode())
                (folder / PART).mkdir()
                (folder / PART / about.file).touch()
                found = self.find(sha256)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "the upload's folder cannot be read")
            with Writer(self, found) as writer:
                yield writer

    def use(self, sha256: str) -> Upload | None:
        """Return an upload, and renew the time for which it is kept; None where nothing of it is there."""
        folder = self._folder / sha256
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with ExitStack() as held:
                try:
                    # Shared with other users: whoever removes it has the lock alone, from looking at the time on.
                    if not _hold(folder, held, fcntl.LOCK_SH):
                        return None
                    os.utime(folder)
                    return self.find(sha256)
                except UploadBusy:
                    found = self.find(sha256)
                    if found is None or not found.complete or time.monotonic() > deadline:
                        return found
            time.sleep(TICK_S)

    def remove(self, sha256: str, *, unused_since: float | None = None) -> bool:
        """Forget an upload, and return whether it is gone. Folders that have its file keep it.

        Args:
            unused_since: it stays if it was used after this time, in seconds since 1970.

        Raises:
            UploadBusy: a request is sending it.
        """
        folder = self._folder / sha256
        with ExitStack() as held:
            if not _hold(folder, held):
                return False
            if unused_since is not None and folder.stat().st_mtime > unused_since:
                return False
            _remove(folder)
        return True

    def unused(self, since: float) -> Iterator[str]:
        """Yield the address of each upload that was not used after `since`, and remove what crashes left."""
        with suppress(FileNotFoundError):
            for entry in list(os.scandir(self._folder)):
                if entry.name.startswith(REMOVED):
                    shutil.rmtree(entry.path, ignore_errors=True)
                elif ADDRESS.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        if entry.stat().st_mtime <= since:
                            yield entry.name

    def place(self, upload: Upload) -> RootedPath:
        """Return where the content of a complete upload is: a file, or a folder."""
        content = upload.folder / CONTENT
        return RootedPath(content if upload.about.name is None else content / upload.about.name, content)


class Writer:
    """An upload that is held to be written to, as long as it is in context."""

    def __init__(self, uploads: TenantUploads, upload: Upload) -> None:
        self._uploads = uploads
        self.upload = upload
        self._descriptor = -1

    def __enter__(self) -> "Writer":
        if not self.upload.complete:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.utime(self.upload.folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.upload.folder / PART / self.upload.about.file

    @property
    def received(self) -> int:
        return os.fstat(self._descriptor).st_size

    def write(self, content: bytes) -> None:
        """Append bytes. What was written before an error stays."""
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def cut(self, size: int) -> None:
        """Drop all bytes from `size` on."""
        os.ftruncate(self._descriptor, size)

    def check(self) -> None:
        """Compare all bytes with the digest, and their beginning and end with what the name promises.

        Raises UploadRefused; the bytes are to be dropped then.
        """
        os.fsync(self._descriptor)
        with self.path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            beginning = stream.read(BEGINNING_BYTES)
            stream.seek(max(0, self.upload.about.bytes - len(PARQUET_MARK)))
            end = stream.read()
        if found != self.upload.sha256:
            raise UploadRefused(
                f"the bytes that arrived have the sha256 {found}; all of them are dropped, send it anew"
            )
        problem = _problem(self.upload.about.file, beginning, end)
        if problem is not None:
            raise UploadRefused(f"{self.upload.about.file}: {problem}")

    def drop(self) -> None:
        """Forget the upload, whose bytes were refused."""
        _remove(self.upload.folder)

    def publish_file(self, others: Collection[Path]) -> Upload:
        """Let jobs read the file.

        Args:
            others: folders of other tenants' uploads. A file of this digest that one of them has takes the place of
                this one, so that the disk holds it once.
        """
        os.chmod(self.path, 0o444)
        for other in others:
            same = TenantUploads(other).find(self.upload.sha256)
            if same is None or not same.complete or same.about.name is None:
                continue
            with suppress(OSError):  # it was just removed, or has as many names as a file can have
                link = self.path.with_name(f"{REMOVED}{secrets.token_hex(8)}")
                os.link(TenantUploads(other).place(same).path, link)
                link.replace(self.path)
                break
        return self._publish(self.upload.folder / PART)

    def publish_folder(self, files: Mapping[str, str]) -> Upload:
        """Let jobs read a folder of the tenant's own files.

        Args:
            files: sha256 of each file by its path in the folder.

        Raises UploadRefused when one of the files is not there.
        """
        new = self.upload.folder / f"{CONTENT}.new"
        shutil.rmtree(new, ignore_errors=True)
        for path, sha256 in files.items():
            file = self._uploads.use(sha256)
            if file is None or not file.complete or file.about.name is None:
                state = "there is no such upload" if file is None else "its upload is not complete"
                if file is not None and file.about.name is None:
                    state = "that is a folder"
                raise UploadRefused(f"'{path}' is {sha256}: {state}; upload every file before its folder's manifest")
            if group(file.about.name) != group(path):
                raise UploadRefused(f"'{path}' is {sha256}, which was uploaded as {file.about.name}, of another format")
            target = new / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._uploads.place(file).path, target)
            except FileNotFoundError as error:
                raise UploadRefused(f"'{path}' is {sha256}, which was deleted just now") from error
        return self._publish(new)

    def _publish(self, made: Path) -> Upload:
        for path in [*made.rglob("*"), made]:
            if path.is_dir():
                _flush(path)
        made.rename(self.upload.folder / CONTENT)
        shutil.rmtree(self.upload.folder / PART, ignore_errors=True)
        _flush(self.upload.folder)
        found = self._uploads.find(self.upload.sha256)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "the upload's folder cannot be read")
        return found


class UploadFolders:
    """The uploads of all tenants."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def of(self, tenant: str) -> TenantUploads:
        return TenantUploads(uploads_of(self._data_dir, tenant))

    def others(self, tenant: str) -> list[Path]:
        """Return the folders of all other tenants' uploads."""
        return [folder for name, folder in uploads_of_all(self._data_dir).items() if name != tenant]

    def missing_bytes(self) -> int:
        """Return the bytes that were announced, by whichever tenant, and are not there yet."""
        return sum(self.of(tenant).missing_bytes() for tenant in self.tenants())

    def tenants(self) -> list[str]:
        """Return the tenants that may have uploads."""
        return list(uploads_of_all(self._data_dir))


def remove_unused(folders: UploadFolders, in_use: InUse, retention_s: float) -> None:
    """Remove the uploads that nothing has used for their time, but those that an active job reads."""
    since = time.time() - retention_s
    unused = [(tenant, sha256) for tenant in folders.tenants() for sha256 in folders.of(tenant).unused(since)]
    if not unused:
        return
    held = in_use()
    for tenant, sha256 in unused:
        if (tenant, sha256) in held:
            folders.of(tenant).use(sha256)
            continue
        with suppress(UploadBusy):
            if folders.of(tenant).remove(sha256, unused_since=since):
                logger.info("upload %s of tenant %s was not used for its time and is removed", sha256, tenant)


def _problem(name: str, beginning: bytes, end: bytes) -> str | None:
    """Say what is wrong with a file whose beginning and end are these; None if nothing is."""
    if beginning.startswith(STRANGERS):
        return "it begins as a pickle or an archive does, whatever its name says; those are not taken"
    if group(name) == PARQUET and not (beginning.startswith(PARQUET_MARK) and end == PARQUET_MARK):
        return "it does not begin and end as a Parquet file does"
    return None


def _hold(folder: Path, held: ExitStack, lock: int = fcntl.LOCK_EX) -> bool:
    """Lock a folder as long as `held` is open. Returns False when it is gone. Raises UploadBusy."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UploadBusy from None
    try:
        return os.fstat(descriptor).st_ino == folder.stat().st_ino
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> None:
    """Remove a folder at once for all who look it up; what a crash leaves of it is removed later."""
    gone = folder.with_name(f"{REMOVED}{secrets.token_hex(8)}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
