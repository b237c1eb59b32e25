import base64
import hashlib
import mimetypes
import tarfile
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from app.api.conditional import is_current, not_modified
from app.api.dependencies import RecordOf, ServicesOf
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Record, Status
from app.services.composition import Services
from app.storage.artifacts import ArtifactFile
from worker.engine.catalog.report import MANIFEST

router = APIRouter(tags=["artifacts"])

CHUNK_BYTES = 1 << 20
MEDIA_TYPES = {".safetensors": "application/octet-stream", ".md": "text/markdown; charset=utf-8"}


class ArtifactResponse(FileResponse):
    """A file, with ranges; a range that cannot be had is a problem document like every other refusal."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def refuse_or_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                if message["status"] == 416:
                    raise ProblemError(
                        Problem.RANGE_NOT_SATISFIABLE,
                        f"the file has {self.headers['content-length']} bytes",
                        None,
                        **{"Content-Range": f"bytes */{self.headers['content-length']}"},
                    )
                raise ProblemError(Problem.MALFORMED, "the Range header is malformed; write bytes=FIRST-LAST")
            await send(message)

        await super().__call__(scope, receive, refuse_or_send)


class FileEntry(BaseModel):
    name: str
    bytes: int
    sha256: str
    media_type: str
    href: str


class Listing(BaseModel):
    files: list[FileEntry]
    archive: str


@router.get("/jobs/{job_id}/artifacts")
def list_files(record: RecordOf, services: ServicesOf) -> Listing:
    """Every file of a succeeded job's artifact. Files with the same sha256 need downloading only once."""
    return Listing(
        files=[
            FileEntry(
                name=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                media_type=_media_type(file.name),
                href=f"/jobs/{record.id}/artifacts/{quote(file.name)}",
            )
            for file in _files(record, services)
        ],
        archive=f"/jobs/{record.id}/archive",
    )


@router.head("/jobs/{job_id}/artifacts/{name:path}", include_in_schema=False)
@router.get("/jobs/{job_id}/artifacts/{name:path}", response_class=ArtifactResponse)
def get_file(
    name: str, record: RecordOf, services: ServicesOf, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """One file: ranges, a strong ETag and its sha256 as Repr-Digest (RFC 9530)."""
    return _serve(name, record, services, if_none_match, "attachment")


@router.get("/jobs/{job_id}/report", response_class=ArtifactResponse)
def report(record: RecordOf, services: ServicesOf, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The report page."""
    return _serve("report.html", record, services, if_none_match, "inline")


@router.get("/jobs/{job_id}/archive", response_class=StreamingResponse)
def archive(record: RecordOf, services: ServicesOf) -> StreamingResponse:
    """The whole artifact as a tar, made while it is sent; a shard that several models share is in it once."""
    entries = list(_tar_entries(record, _files(record, services)))
    size = sum(len(header) + _padded(file.bytes if file else 0) for header, file in entries) + TAR_END
    return StreamingResponse(
        _tar(entries),
        media_type="application/x-tar",
        headers={
            "Content-Length": str(size),
            "Content-Disposition": f'attachment; filename="{record.id}.tar"',
        },
    )


def _files(record: Record, services: Services) -> list[ArtifactFile]:
    if record.status is not Status.SUCCEEDED or record.artifact is None:
        raise ProblemError(
            Problem.CONFLICT, f"job {record.id} is {record.status.value}; its artifact comes with success"
        )
    manifest = services.artifacts.manifest(record.artifact)
    try:
        content = manifest.read_bytes()
        files = services.artifacts.files(record.artifact)
    except FileNotFoundError as error:
        raise ProblemError(
            Problem.NOT_FOUND, f"the artifact of job {record.id} is gone from the data folder"
        ) from error
    return [*files, ArtifactFile(MANIFEST, len(content), hashlib.sha256(content).hexdigest(), manifest)]


def _serve(name: str, record: Record, services: Services, if_none_match: str | None, disposition: str) -> Response:
    file = next((file for file in _files(record, services) if file.name == name), None)
    if file is None or not file.path.is_file():
        raise ProblemError(Problem.NOT_FOUND, f"the artifact of job {record.id} has no file '{name}'")
    etag = f'"{file.sha256}"'
    if is_current(if_none_match, etag):
        return not_modified(etag)
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    return ArtifactResponse(
        file.path,
        media_type=_media_type(name),
        filename=file.path.name,
        content_disposition_type=disposition,
        headers={"ETag": etag, "Repr-Digest": f"sha-256=:{digest}:", "Cache-Control": "private, immutable"},
    )


def _media_type(name: str) -> str:
    suffix = "." + name.rpartition(".")[2]
    return MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


TAR_END = 2 * tarfile.BLOCKSIZE  # two empty blocks close an archive


def _tar_entries(record: Record, files: list[ArtifactFile]) -> Iterator[tuple[bytes, ArtifactFile | None]]:
    """(header, file whose bytes follow, or None for a link to an earlier one)."""
    first: dict[str, str] = {}
    for file in files:
        entry = tarfile.TarInfo(file.name)
        entry.mode = 0o644
        entry.mtime = (record.finished_ms or 0) // 1000
        earlier = first.get(file.sha256) if file.name.endswith(".safetensors") else None
        if earlier is not None:
            entry.type, entry.linkname = tarfile.LNKTYPE, earlier
            yield entry.tobuf(tarfile.PAX_FORMAT), None
            continue
        first[file.sha256] = file.name
        entry.size = file.bytes
        yield entry.tobuf(tarfile.PAX_FORMAT), file


def _tar(entries: list[tuple[bytes, ArtifactFile | None]]) -> Iterator[bytes]:
    for header, file in entries:
        yield header
        if file is not None:
            with file.path.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
            yield b"\0" * (_padded(file.bytes) - file.bytes)
    yield b"\0" * TAR_END


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
