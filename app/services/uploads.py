"""Takes uploads: their bytes in order, in as many requests as it takes, and checks what arrived."""

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from anyio.to_thread import run_sync

from app.contracts.errors import Problem, ProblemError
from app.contracts.uploads import (
    MAX_MANIFEST_BYTES,
    SAFETENSORS,
    ManifestError,
    UploadStatus,
    ending,
    read_manifest,
)
from app.services.inspection import Inspectors
from app.services.limits import Room
from app.storage.uploads import About, InUse, Upload, UploadBusy, UploadFolders, UploadRefused, Writer

BLOCK_BYTES = 1 << 20  # held of each request, whatever it sends


@dataclass(frozen=True)
class Chunk:
    """The bytes that a request brings."""

    first: int | None
    """Place of the first of them in the upload; None where there are none, and a whole upload is to be finished."""
    bytes: int
    total: int
    anew: bool
    """Whether they are all of the upload, and take the place of what is there of it."""


@dataclass(frozen=True)
class Uploads:
    """The use cases behind `/uploads`. Each raises ProblemError when it refuses.

    Args:
        in_use: see `InUse`.
        room: decides whether there is room for further bytes.
        max_bytes: size of the largest upload.
        retention_s: seconds for which an upload is kept that nothing uses.
    """

    folders: UploadFolders
    inspectors: Inspectors
    in_use: InUse
    room: Room
    max_bytes: int
    retention_s: float

    async def put(
        self, tenant: str, sha256: str, about: About, chunk: Chunk, body: AsyncIterator[bytes]
    ) -> tuple[UploadStatus, bool]:
        """Take bytes of an upload, and check it once all are there. Returns its status, and whether it became complete.

        The body is read only if its bytes are wanted, and written as it comes.
        """
        most = MAX_MANIFEST_BYTES if about.kind == "folder" else self.max_bytes
        if about.bytes > most:
            raise ProblemError(Problem.TOO_LARGE, f"the upload has {about.bytes} bytes; {most} are allowed")
        uploads = self.folders.of(tenant)
        with ExitStack() as held, _storing(uploads.find, sha256):
            writer = await run_sync(self._begin, held, tenant, sha256, about, chunk.anew)
            upload = writer.upload
            _require_same(upload, about)
            if upload.complete:
                return upload.status(self.retention_s), False
            if chunk.first is not None and chunk.first != writer.received:
                raise _wrong_offset(upload, f"the bytes begin at {chunk.first}, and {writer.received} are there")
            await _receive(writer, chunk, body)
            if writer.received < about.bytes:
                found = await run_sync(uploads.use, sha256)
                return (found or upload).status(self.retention_s), False
            done = await self._finish(tenant, writer)
            return done.status(self.retention_s), True

    def get(self, tenant: str, sha256: str) -> UploadStatus:
        return self._found(tenant, sha256).status(self.retention_s)

    def delete(self, tenant: str, sha256: str) -> None:
        self._found(tenant, sha256)
        if (tenant, sha256) in self.in_use():
            detail = f"a job that waits or runs reads upload {sha256}; cancel it first, or wait for its end"
            raise ProblemError(Problem.CONFLICT, detail)
        try:
            self.folders.of(tenant).remove(sha256)
        except UploadBusy as error:
            raise _busy() from error

    def _found(self, tenant: str, sha256: str) -> Upload:
        found = self.folders.of(tenant).find(sha256)
        if found is None:
            raise ProblemError(Problem.NOT_FOUND, f"there is no upload {sha256}")
        return found

    def _begin(self, held: ExitStack, tenant: str, sha256: str, about: About, anew: bool) -> Writer:
        """Return what writes an upload, as long as `held` is open. Raises ProblemError, UploadBusy, OSError."""
        uploads = self.folders.of(tenant)
        with uploads.announcing():  # so that no two uploads are both taken for the last room
            self._require_room(tenant, sha256, about.bytes)
            return held.enter_context(uploads.writing(sha256, about, anew=anew))

    def _require_room(self, tenant: str, sha256: str, total: int) -> None:
        """Raise ProblemError where there is no room for an upload, or for the rest of it."""
        found = self.folders.of(tenant).find(sha256)
        self.room.require_for_upload(tenant, max(0, total - (0 if found is None else found.about.bytes)))

    async def _finish(self, tenant: str, writer: Writer) -> Upload:
        """Check a whole upload, and let jobs read it; one that is refused is dropped."""
        about, source = writer.upload.about, f"upload:{writer.upload.sha256}"
        try:
            await run_sync(writer.check)
            if about.kind == "folder":
                files = await run_sync(_manifest, writer.path)
                return await run_sync(writer.publish_folder, files)
            if ending(about.file) == SAFETENSORS:
                await self.inspectors.check_weights(writer.path, source)
            return await run_sync(writer.publish_file, self.folders.others(tenant))
        except UploadRefused as error:
            await run_sync(writer.drop)
            raise ProblemError(Problem.UPLOAD_REFUSED, str(error)) from error
        except ProblemError as error:
            if error.problem is not Problem.INVALID_CHECKPOINT:  # it could not be checked now, and keeps its bytes
                raise
            await run_sync(writer.drop)
            raise ProblemError(Problem.UPLOAD_REFUSED, error.detail) from error


async def _receive(writer: Writer, chunk: Chunk, body: AsyncIterator[bytes]) -> None:
    """Write a body as it comes. If it ends early, the bytes that came before are kept."""
    begin, missing, waiting = writer.received, chunk.bytes, bytearray()
    try:
        async for more in body:
            missing -= len(more)
            if missing < 0:
                waiting.clear()
                await run_sync(writer.cut, begin)
                detail = f"the body has more than the {chunk.bytes} bytes that it announces; none of them are kept"
                raise ProblemError(Problem.MALFORMED, detail)
            waiting += more
            if len(waiting) >= BLOCK_BYTES:
                block = bytes(waiting)
                waiting.clear()
                await run_sync(writer.write, block)
    finally:
        writer.write(bytes(waiting))
    if missing:
        raise ProblemError(Problem.MALFORMED, f"the body ended {missing} bytes before what it announces")


def _manifest(path: Path) -> dict[str, str]:
    try:
        return read_manifest(path.read_bytes())
    except ManifestError as error:
        raise UploadRefused(f"the folder's manifest: {error}") from error


def _require_same(upload: Upload, about: About) -> None:
    """Raise ProblemError where an upload was announced as something else before."""
    there = upload.about
    if there.bytes != about.bytes:
        detail = f"the upload was announced with {there.bytes} bytes before, and now with {about.bytes}"
    elif there.kind != about.kind:
        detail = f"it is a {there.kind} already"
    elif there.kind == "file" and ending(there.file) != ending(about.file):
        detail = f"it is {there.name} already, whose ending says another format than that of {about.name}"
    else:
        return
    raise ProblemError(Problem.CONFLICT, f"{detail}; delete it to send it otherwise")


@contextmanager
def _storing(find: Callable[[str], Upload | None], sha256: str) -> Iterator[None]:
    try:
        yield
    except UploadBusy as error:
        raise _busy(find(sha256)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        detail = "the disk is full; what arrived is kept, so go on once there is room"
        raise ProblemError(Problem.NO_SPACE, detail, None, **{"Retry-After": "60"}) from error


def progress_headers(upload: Upload | UploadStatus | None) -> dict[str, str]:
    """Return the headers that say how much of an upload is there (draft-ietf-httpbis-resumable-upload)."""
    if upload is None:
        return {}
    total, received = (
        (upload.about.bytes, upload.received) if isinstance(upload, Upload) else (upload.bytes, upload.received_bytes)
    )
    complete = "?1" if upload.complete else "?0"
    return {"Upload-Offset": str(received), "Upload-Length": str(total), "Upload-Complete": complete}


def _busy(upload: Upload | None = None) -> ProblemError:
    detail = "another request is sending or removing this upload; ask how much is there, and try again"
    return ProblemError(Problem.CONFLICT, detail, None, **{"Retry-After": "1"}, **progress_headers(upload))


def _wrong_offset(upload: Upload, detail: str) -> ProblemError:
    return ProblemError(Problem.WRONG_OFFSET, f"{detail}; go on from there", None, **progress_headers(upload))
