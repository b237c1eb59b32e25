"""One bucket: its objects listed, read by ranges, written in parts, removed and signed.

Whatever fails is told as `StorageAway`, without what the library says of it: that may quote answers and signed URLs.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from app.contracts.object_storage import ObjectStorage
from app.storage.inputs import OnBytes
from app.storage.objects.credentials import KeyFile
from app.storage.objects.errors import Forbidden, NoBucket, ObjectChanged, StorageAway

if TYPE_CHECKING:
    from obstore import ObjectMeta

PART_BYTES = 8 << 20  # of a download; large enough that the time until its first byte does not count
UPLOADED_BYTES = 16 << 20  # of an upload: 10,000 parts are 160 GB
DOWNLOADS = 8
UPLOADS = 4
REQUESTS = 32  # for small objects at once
TICK_S = 0.5  # whoever waits for bytes is told this often, and may give up
MOST_OBJECTS = 10_000

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a call may take: seconds of a request, requests after the first, and seconds of all of them."""

    request_s: float
    retries: int
    total_s: float


AT_THE_DOOR = Patience(request_s=8, retries=2, total_s=12)  # a caller waits
AT_WORK = Patience(request_s=30, retries=8, total_s=120)
IN_PASSING = Patience(request_s=2, retries=0, total_s=2)  # what a sweep does too


@dataclass(frozen=True)
class StoredObject:
    key: str
    size: int
    etag: str
    written: float = field(default=0.0, compare=False)
    """Time at which it was written, in seconds since 1970; 0 where nobody asked."""


class Bucket:
    """A bucket, as this service's keys may use it."""

    def __init__(self, name: str, settings: ObjectStorage, patience: Patience) -> None:
        self.name = name
        self._settings = settings
        self._patience = patience
        self._store = self._opened(settings.endpoint)

    def objects(self, prefix: str, most: int = MOST_OBJECTS) -> list[StoredObject]:
        """Return the objects below a prefix by their keys. Raises StorageAway; ValueError where there are too many."""
        found: list[StoredObject] = []
        for one in self.each(prefix):
            found.append(one)
            if len(found) > most:
                raise ValueError(f"there are more than {most} objects below {self.name}/{prefix}")
        return found

    def each(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the objects below a prefix by their keys, however many there are. Raises StorageAway."""
        with self._translated():
            for chunk in obstore.list(self._store, prefix or None, chunk_size=1000):
                for one in chunk:
                    yield StoredObject(one["path"], one["size"], one["e_tag"] or "", one["last_modified"].timestamp())

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys of all objects below a prefix, however many there are. Raises StorageAway."""
        return (one.key for one in self.each(prefix))

    def head(self, key: str) -> StoredObject:
        """Raises FileNotFoundError, StorageAway."""
        with self._translated(key):
            found = obstore.head(self._store, key)
        return StoredObject(key, found["size"], found["e_tag"] or "")

    def read(self, one: StoredObject, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes `begin` to `end` of an object. Raises ObjectChanged, StorageAway."""
        end = one.size if end is None else min(end, one.size)
        if begin >= end:
            return b""
        with self._translated(one.key), _listed(one):
            found = obstore.get(self._store, one.key, options={"range": (begin, end)})
            return self._checked(one, end - begin, found.meta, bytes(found.bytes()))

    def read_whole(self, key: str, most: int) -> tuple[bytes, float]:
        """Return an object of at most so many bytes, and when it was written, in seconds since 1970.

        Raises FileNotFoundError, StorageAway; ValueError where it is larger.
        """
        with self._translated(key):
            found = obstore.get(self._store, key)
            if found.meta["size"] > most:
                raise ValueError(f"{key} has more than {most} bytes")
            return bytes(found.bytes()), found.meta["last_modified"].timestamp()

    def read_each(self, objects: Sequence[StoredObject]) -> list[bytes | None]:
        """Return small objects, read several at once; None for those that are gone or changed. Raises StorageAway."""

        async def read(one: StoredObject) -> bytes | None:
            try:
                return await self._range(one, 0, one.size)
            except ObjectChanged:
                return None

        return asyncio.run(_several([partial(read, one) for one in objects]))

    def download(self, wanted: Mapping[Path, StoredObject], on_bytes: OnBytes) -> None:
        """Download objects to files, which are on the disk when it returns.

        Several parts are under way at once. A file has a name of its own while it is not whole, so one that is there
        was downloaded before.

        Args:
            on_bytes: called at least twice a second.

        Raises:
            ObjectChanged, StorageAway; OSError where a file cannot be written; and whatever `on_bytes` raises.
        """
        asyncio.run(_Download(self._range, wanted, on_bytes).run())

    def upload(self, key: str, path: Path, media_type: str, on_read: Callable[[int], object]) -> None:
        """Upload a file, in parts where it is large; nobody sees it before all are there.

        Args:
            on_read: called with the number of bytes of each part that goes out; and several times a second with 0. It
                may raise to give up, and then the parts are removed.

        Raises:
            StorageAway; OSError where the file cannot be read; and whatever `on_read` raises.
        """
        asyncio.run(self._upload(key, path, media_type, on_read))

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, one after the other, since not every storage removes several at once. Raises StorageAway."""
        for key in keys:
            with self._translated(key):
                obstore.delete(self._store, key)

    def remove_each(self, keys: Sequence[str]) -> None:
        """Remove objects in any order, several at once. Raises StorageAway."""

        async def remove(key: str) -> None:
            with self._translated(key):
                await obstore.delete_async(self._store, key)

        asyncio.run(_several([partial(remove, key) for key in keys]))

    def signed(self, key: str, seconds: float) -> str:
        """Return a URL at which whoever has it can read the object for this time. No request is made."""
        store = self._store
        if self._settings.public_endpoint is not None:
            store = self._opened(self._settings.public_endpoint)
        with self._translated(key):
            return obstore.sign(store, "GET", key, timedelta(seconds=seconds))

    def _opened(self, endpoint: str | None) -> S3Store:
        patience, settings = self._patience, self._settings
        given: dict[str, Any] = {}
        if endpoint is not None:
            given["endpoint"] = endpoint
        if settings.region is not None:
            given["region"] = settings.region
        if settings.credentials_file is not None:
            keys = KeyFile(settings.credentials_file)
            try:
                keys()
            except ValueError as error:
                raise StorageAway(str(error)) from error
            given["credential_provider"] = keys
        return S3Store(
            self.name,
            client_options={
                "timeout": timedelta(seconds=patience.request_s),
                "connect_timeout": timedelta(seconds=min(5.0, patience.request_s)),
                # A plain endpoint is one that the operator wrote down.
                "allow_http": urlsplit(endpoint or os.environ.get("AWS_ENDPOINT_URL", "")).scheme == "http",
            },
            retry_config={
                "max_retries": patience.retries,
                "retry_timeout": timedelta(seconds=patience.total_s),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.2),
                    "max_backoff": timedelta(seconds=10),
                    "base": 2,
                },
            },
            **given,
        )

    async def _range(self, one: StoredObject, begin: int, end: int) -> bytes:
        with self._translated(one.key), _listed(one):
            found = await obstore.get_async(self._store, one.key, options={"range": (begin, end)})
            return self._checked(one, end - begin, found.meta, bytes(await found.bytes_async()))

    def _checked(self, one: StoredObject, expected: int, meta: "ObjectMeta", content: bytes) -> bytes:
        # Compared here, because not every storage knows If-Match.
        if meta["e_tag"] not in (None, one.etag) or meta["size"] != one.size:
            raise ObjectChanged(f"{one.key} was changed")
        if len(content) != expected:
            raise StorageAway(f"bucket {self.name} sends only a part of {one.key}")
        return content

    async def _upload(self, key: str, path: Path, media_type: str, on_read: Callable[[int], object]) -> None:
        problem: list[BaseException] = []

        def tell(count: int) -> None:
            if not problem:
                try:
                    on_read(count)
                except BaseException as error:
                    problem.append(error)
            if problem:  # no further part is read then, and the library removes the parts before
                raise problem[0]

        def parts() -> Iterator[bytes]:
            with path.open("rb") as stream:
                while part := stream.read(UPLOADED_BYTES):
                    tell(len(part))
                    yield part

        async def put() -> None:
            is_small = path.stat().st_size <= UPLOADED_BYTES
            with self._translated(key):
                await obstore.put_async(
                    self._store,
                    key,
                    b"".join(parts()) if is_small else parts(),
                    attributes={"Content-Type": media_type},
                    use_multipart=not is_small,
                    chunk_size=UPLOADED_BYTES,
                    max_concurrency=UPLOADS,
                )

        upload = asyncio.create_task(put())
        try:
            while not (await asyncio.wait([upload], timeout=TICK_S))[0]:
                tell(0)
            await upload
        except BaseException:
            upload.cancel()
            if problem:  # not every storage can remove parts, and what it says of that is no answer
                raise problem[0] from None
            raise

    @contextmanager
    def _translated(self, key: str = "") -> Iterator[None]:
        where = f"bucket {self.name}"
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise NoBucket(f"there is no bucket {self.name}") from None
            raise FileNotFoundError(key) from None
        except (PermissionDeniedError, UnauthenticatedError):
            raise Forbidden(f"{where} may not be used with this service's keys") from None
        except BaseError as error:
            said = str(error)
            if "NoSuchBucket" in said:
                raise NoBucket(f"there is no bucket {self.name}") from None
            logger.debug("object storage fails: %s of %s", type(error).__name__, where)
            raise StorageAway(f"{where}{f' ({key})' if key else ''} {_why(said)}") from None


async def _several(calls: Sequence[Callable[[], Coroutine[Any, Any, Answer]]]) -> list[Answer]:
    """Return the answers of calls, of which a few are under way at once."""
    turns = asyncio.Semaphore(REQUESTS)

    async def run(call: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        async with turns:
            return await call()

    return await asyncio.gather(*map(run, calls))


@contextmanager
def _listed(one: StoredObject) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ObjectChanged(f"{one.key} is gone") from None


def _why(said: str) -> str:
    """Say in a few words why a request failed."""
    status = said.partition("status code: ")[2][:3]
    if status.isdigit():
        return f"answers {status}"
    if "credential" in said.lower() or "169.254.169.254" in said:
        return "cannot be used, since no keys are found"
    return "does not answer in time" if "kind: Timeout" in said or "timed out" in said else "does not answer"


class _Download:
    """Files of objects, filled by parts of which several are under way at once."""

    def __init__(
        self,
        read: Callable[[StoredObject, int, int], Coroutine[Any, Any, bytes]],
        wanted: Mapping[Path, StoredObject],
        on_bytes: OnBytes,
    ) -> None:
        self._read = read
        self._wanted = wanted
        self._on_bytes = on_bytes
        self._total = sum(one.size for one in wanted.values())
        self._done = 0
        self._left: dict[Path, int] = {}

    async def run(self) -> None:
        parts = self._parts()
        pending: set[asyncio.Task[None]] = set()
        try:
            while True:
                while len(pending) < DOWNLOADS and (part := next(parts, None)) is not None:
                    pending.add(asyncio.create_task(self._fill(*part)))
                self._on_bytes(self._done, self._total)
                if not pending:
                    return
                done, pending = await asyncio.wait(pending, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _parts(self) -> Iterator[tuple[Path, StoredObject, int]]:
        for path, one in self._wanted.items():
            if path.exists():
                self._done += one.size
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with _unfinished(path).open("wb") as stream:
                stream.truncate(one.size)
            self._left[path] = one.size
            if one.size == 0:
                self._finish(path)
            for begin in range(0, one.size, PART_BYTES):
                yield path, one, begin

    async def _fill(self, path: Path, one: StoredObject, begin: int) -> None:
        content = await self._read(one, begin, min(begin + PART_BYTES, one.size))
        await asyncio.to_thread(_write, _unfinished(path), content, begin)
        self._done += len(content)
        self._left[path] -= len(content)
        if not self._left[path]:
            await asyncio.to_thread(self._finish, path)

    def _finish(self, path: Path) -> None:
        with _unfinished(path).open("rb") as stream:
            os.fsync(stream.fileno())  # a machine's crash leaves no file of zeros under this name
        _unfinished(path).rename(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _write(path: Path, content: bytes, begin: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(begin)
        stream.write(content)
