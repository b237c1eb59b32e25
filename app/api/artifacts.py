import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from app.api.conditional import PreconditionsOf, not_modified
from app.api.dependencies import RecordOf, ServicesOf, read_again
from app.api.files import ArchiveResponse, held_open, serve
from app.api.openapi import NOT_MODIFIED, RANGES, Responses, file_responses, headers, problems
from app.api.strict_route import StrictRoute
from app.contracts.artifacts import FileEntry, Listing
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Record, Status
from app.services.composition import Services
from app.storage.files import Damaged, StoredFile, media_type
from app.storage.objects.errors import StorageAway
from worker.engine.catalog.contracts.report import PAGE_POLICY

router = APIRouter(tags=["artifacts"], route_class=StrictRoute)
logger = logging.getLogger(__name__)

ARCHIVE: Responses = {
    200: {
        "description": "The archive",
        "content": {"application/x-tar": {}},
        "headers": headers(Content_Disposition="The archive's name", ETag="Changes when the content does"),
    },
    304: NOT_MODIFIED,
    **problems(409),
}


FileName = Annotated[str, Path(description="The file's name, as the listing has it")]


@router.get("/jobs/{job_id}/artifacts", responses=problems(409))
def list_files(record: RecordOf, services: ServicesOf) -> Listing:
    """List every file of a succeeded job's artifact. Files with the same sha256 need downloading only once.

    500 with `artifact_damaged` when one of them is missing or not as long as it was.
    """
    return Listing(
        files=[
            FileEntry(
                name=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                media_type=media_type(file.name),
                href=f"/jobs/{record.id}/artifacts/{quote(file.name)}",
            )
            for file in _all_files(record, services)
        ],
        archive=f"/jobs/{record.id}/archive",
    )


@router.get(
    "/jobs/{job_id}/artifacts/{name:path}",
    response_class=FileResponse,
    responses=file_responses("*/*") | problems(409),
    openapi_extra=RANGES,
)
def get_file(
    name: FileName, record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf, request: Request
) -> Response:
    """Send one file, with ranges, a strong ETag and its sha256 as Repr-Digest (RFC 9530).

    It is sent to its end also when the job is removed meanwhile. For a large file in object storage, the answer is 307
    with a signed URL, if the service is set so.
    """
    return serve(*_file(name, record, services), preconditions, redirects=request.method == "GET")


@router.get(
    "/jobs/{job_id}/report",
    response_class=FileResponse,
    responses=file_responses("text/html") | problems(409),
    openapi_extra=RANGES,
)
def report(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> Response:
    """Send the report page."""
    response = serve(*_file("report.html", record, services), preconditions, "inline", redirects=False)
    response.headers.update({"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})
    return response


@router.get("/jobs/{job_id}/archive", response_class=StreamingResponse, responses=ARCHIVE)
def archive(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> Response:
    """Send the whole artifact as a tar, which is made meanwhile; a shard that several models share is in it once.

    The connection is closed before `Content-Length` bytes are sent when the job is removed meanwhile.
    """
    finished = datetime.fromtimestamp((record.finished_ms or 0) / 1000, UTC)
    made = ArchiveResponse(_all_files(record, services), record.id, finished, ExitStack())
    if preconditions.is_current(made.etag, finished.timestamp()):
        return not_modified(made.etag, made.caching)
    return made


def _all_files(record: Record, services: Services) -> Sequence[StoredFile]:
    """Return every file of the artifact, after checking that each still has its length."""
    with _intact(record, services) as artifact:
        files = services.artifacts.open(artifact).files
        for file in files:
            file.check()
        return files


def _file(name: str, record: Record, services: Services) -> tuple[StoredFile, ExitStack]:
    """Return one of these files, held open until the stack is closed."""
    with _intact(record, services) as artifact:
        for file in services.artifacts.open(artifact).files:
            if file.name == name:
                return held_open(file)
    raise ProblemError(Problem.NOT_FOUND, f"the artifact of job {record.id} has no file '{name}'")


@contextmanager
def _intact(record: Record, services: Services) -> Iterator[str]:
    """Yield the artifact's name. A fault of it becomes a problem; if the job is gone, the problem says so."""
    if record.status is not Status.SUCCEEDED or record.artifact is None:
        raise ProblemError(
            Problem.CONFLICT, f"job {record.id} is {record.status.value}; its artifact comes with success"
        )
    try:
        yield record.artifact
    except StorageAway as error:
        problem, detail = Problem.STORAGE_UNAVAILABLE, f"the artifact of job {record.id} cannot be read: {error}"
        raise ProblemError(problem, detail, None, **{"Retry-After": "10"}) from error
    except (FileNotFoundError, Damaged) as error:
        read_again(record, services)
        if isinstance(error, FileNotFoundError):
            detail = f"the artifact of job {record.id} is gone from its storage"
            raise ProblemError(Problem.NOT_FOUND, detail) from error
        logger.error("the artifact of job %s is damaged: %s", record.id, error)
        detail = f"the artifact of job {record.id} is damaged: {error}; post its recipe again to have it made anew"
        raise ProblemError(Problem.ARTIFACT_DAMAGED, detail) from error
