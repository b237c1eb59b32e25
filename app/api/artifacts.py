import hashlib
from contextlib import ExitStack
from datetime import UTC, datetime
from urllib.parse import quote

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel

from app.api.conditional import IfNoneMatch
from app.api.dependencies import RecordOf, ServicesOf
from app.api.files import ArchiveResponse, media_type, serve
from app.api.strict_route import StrictRoute
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Record, Status
from app.services.composition import Services
from app.storage.files import StoredFile
from worker.engine.catalog.report import MANIFEST, PAGE_POLICY

router = APIRouter(tags=["artifacts"], route_class=StrictRoute)


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
                media_type=media_type(file.name),
                href=f"/jobs/{record.id}/artifacts/{quote(file.name)}",
            )
            for file in _files(record, services)
        ],
        archive=f"/jobs/{record.id}/archive",
    )


@router.get("/jobs/{job_id}/artifacts/{name:path}", response_class=FileResponse)
def get_file(name: str, record: RecordOf, services: ServicesOf, if_none_match: IfNoneMatch = None) -> Response:
    """One file: ranges, a strong ETag and its sha256 as Repr-Digest (RFC 9530)."""
    return serve(_file(name, record, services), if_none_match)


@router.get("/jobs/{job_id}/report", response_class=FileResponse)
def report(record: RecordOf, services: ServicesOf, if_none_match: IfNoneMatch = None) -> Response:
    """The report page."""
    response = serve(_file("report.html", record, services), if_none_match, "inline")
    response.headers.update({"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})
    return response


@router.get("/jobs/{job_id}/archive", response_class=StreamingResponse)
def archive(record: RecordOf, services: ServicesOf) -> ArchiveResponse:
    """The whole artifact as a tar, made while it is sent; a shard that several models share is in it once."""
    finished = datetime.fromtimestamp((record.finished_ms or 0) / 1000, UTC)
    return ArchiveResponse(_files(record, services), record.id, finished, ExitStack())


def _files(record: Record, services: Services) -> list[StoredFile]:
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
    return [*files, StoredFile(MANIFEST, len(content), hashlib.sha256(content).hexdigest(), manifest)]


def _file(name: str, record: Record, services: Services) -> StoredFile:
    file = next((file for file in _files(record, services) if file.name == name), None)
    if file is None or not file.path.is_file():
        raise ProblemError(Problem.NOT_FOUND, f"the artifact of job {record.id} has no file '{name}'")
    return file
