"""Files as answers: ranges, conditions, digests, and several of them as one archive."""

import base64
import hashlib
import logging
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from email.utils import format_datetime, formatdate
from pathlib import Path
from urllib.parse import quote

from fastapi import Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from app.api.conditional import Preconditions, not_modified
from app.api.ranges import wanted_ranges
from app.storage.files import Damaged, LocalFile, StoredFile, media_type
from app.storage.objects.errors import StorageAway

CHUNK_BYTES = 1 << 20
CACHING = "private, immutable"
logger = logging.getLogger(__name__)

TAR_END = 2 * tarfile.BLOCKSIZE  # two empty blocks close an archive


class StoredFileResponse(FileResponse):
    """A file, with ranges; a range that cannot be had is a problem document like every other refusal.

    Args:
        held: stack that is closed when the file is sent.
    """

    chunk_size = CHUNK_BYTES

    def __init__(self, file: LocalFile, disposition: str, held: ExitStack) -> None:
        digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
        super().__init__(
            file.path,
            media_type=media_type(file.name),
            filename=file.name.rpartition("/")[2],
            content_disposition_type=disposition,
            headers={"ETag": _etag(file), "Repr-Digest": f"sha-256=:{digest}:", "Cache-Control": CACHING},
        )
        self._size = file.bytes
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            ranges = wanted_ranges(Headers(scope=scope), self._size, self.headers["etag"])
            # FileResponse takes ranges that no RFC has, as +1-2, so it gets those that are to be sent, and no others.
            headers = [pair for pair in scope["headers"] if pair[0] not in (b"range", b"if-range")]
            if ranges is not None:
                headers.append((b"range", ("bytes=" + ",".join(f"{first}-{last}" for first, last in ranges)).encode()))
            await super().__call__({**scope, "headers": headers}, receive, send)


class ReadFileResponse(StreamingResponse):
    """A file that lies elsewhere and is passed on as it is read. Of several ranges, all of it is sent, as it may be."""

    def __init__(self, file: StoredFile, disposition: str, modified: float) -> None:
        digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
        name = quote(file.name.rpartition("/")[2])
        super().__init__(
            iter(()),
            media_type=media_type(file.name),
            headers={
                "ETag": _etag(file),
                "Repr-Digest": f"sha-256=:{digest}:",
                "Cache-Control": CACHING,
                "Last-Modified": formatdate(modified, usegmt=True),
                "Accept-Ranges": "bytes",
                "Content-Length": str(file.bytes),
                "Content-Disposition": f"{disposition}; filename*=utf-8''{name}",
            },
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ranges = wanted_ranges(Headers(scope=scope), self._file.bytes, self.headers["etag"])
        first, last = 0, self._file.bytes - 1
        if ranges is not None and len(ranges) == 1:
            [(first, last)] = ranges
            self.status_code = 206
            self.headers["Content-Range"] = f"bytes {first}-{last}/{self._file.bytes}"
            self.headers["Content-Length"] = str(last - first + 1)
        if scope["method"] != "HEAD":
            self.body_iterator = iterate_in_threadpool(_part(self._file, first, last + 1))
        try:
            await super().__call__(scope, receive, send)
        except (Damaged, StorageAway) as error:
            logger.warning("a file is cut off: %s", error)


class ArchiveResponse(StreamingResponse):
    """Files as a tar, made while it is sent. A large file that has several names is in it once.

    The same files and time make the same bytes, of which `etag` is a strong tag.

    Args:
        held: stack that is closed when the archive is sent.
    """

    def __init__(self, files: Sequence[StoredFile], name: str, modified: datetime, held: ExitStack) -> None:
        entries = list(_tar_entries(files, modified))
        described = hashlib.sha256()
        for header, file in entries:
            described.update(header + (file.sha256 if file else "").encode())
        self.etag = f'"{described.hexdigest()}"'
        self.caching = {"Cache-Control": CACHING, "Last-Modified": format_datetime(modified, usegmt=True)}
        size = sum(len(header) + _padded(file.bytes if file else 0) for header, file in entries) + TAR_END
        super().__init__(
            _tar(entries),
            media_type="application/x-tar",
            headers={
                "Content-Length": str(size),
                "Content-Disposition": f'attachment; filename="{name}.tar"',
                "ETag": self.etag,
                **self.caching,
            },
        )
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await super().__call__(scope, receive, send)
            except (
                Damaged,
                StorageAway,
            ) as error:  # its reader sees it too: the connection is closed before all is sent
                logger.warning("an archive is cut off, since its job was removed or its files changed: %s", error)


def held_open(file: StoredFile) -> tuple[StoredFile, ExitStack]:
    """Open the file. It can then be read by its descriptor until the stack is closed. Raises Damaged."""
    held = ExitStack()
    if file.url is not None:
        return file, held
    stream = held.enter_context(file.open())
    if not isinstance(file, LocalFile):
        return file, held
    return LocalFile(file.name, file.bytes, file.sha256, Path(f"/proc/self/fd/{stream.fileno()}")), held


def serve(
    file: StoredFile,
    held: ExitStack,
    preconditions: Preconditions,
    disposition: str = "attachment",
    *,
    redirects: bool = True,
) -> Response:
    """Answer with the file, its URL if clients can read it there, or 304 if the caller has it; `held` is closed.

    Args:
        redirects: whether the caller may be sent to the URL, which is for GET alone.
    """
    with held:
        modified = file.modified
        if not preconditions.is_current(_etag(file), modified):
            if isinstance(file, LocalFile):
                return StoredFileResponse(file, disposition, held.pop_all())
            if redirects and (url := file.url) is not None:  # it can be used for a while, and is another one then
                return RedirectResponse(url, 307, {"Cache-Control": "no-store", "ETag": _etag(file)})
            return ReadFileResponse(file, disposition, modified)
    headers = {"Cache-Control": CACHING, "Last-Modified": formatdate(modified, usegmt=True)}
    return not_modified(_etag(file), headers)


def _etag(file: StoredFile) -> str:
    return f'"{file.sha256}"'


def _tar_entries(files: Sequence[StoredFile], modified: datetime) -> Iterator[tuple[bytes, StoredFile | None]]:
    """Yield pairs: a header, and the file whose bytes follow it, or None for a link to an earlier file."""
    first: dict[str, str] = {}
    for file in files:
        entry = tarfile.TarInfo(file.name)
        entry.mode = 0o644
        entry.mtime = int(modified.timestamp())
        earlier = first.get(file.sha256) if file.name.endswith(".safetensors") else None
        if earlier is not None:
            entry.type, entry.linkname = tarfile.LNKTYPE, earlier
            yield entry.tobuf(tarfile.PAX_FORMAT), None
            continue
        first[file.sha256] = file.name
        entry.size = file.bytes
        yield entry.tobuf(tarfile.PAX_FORMAT), file


def _tar(entries: Sequence[tuple[bytes, StoredFile | None]]) -> Iterator[bytes]:
    for header, file in entries:
        yield header
        if file is not None:
            with file.open() as stream:
                left = file.bytes
                while left:
                    chunk = stream.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise Damaged(f"{file.name} became shorter")
                    left -= len(chunk)
                    yield chunk
            yield b"\0" * (_padded(file.bytes) - file.bytes)
    yield b"\0" * TAR_END


def _part(file: StoredFile, begin: int, end: int) -> Iterator[bytes]:
    with file.open() as stream:
        stream.seek(begin)
        while begin < end:
            chunk = stream.read(min(end - begin, CHUNK_BYTES))
            if not chunk:
                raise Damaged(f"{file.name} became shorter")
            begin += len(chunk)
            yield chunk


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
