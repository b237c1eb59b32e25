"""Uploads: `PUT` brings bytes in as many requests as the caller likes, `HEAD` says how many are there."""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.requests import ClientDisconnect

from app.api.dependencies import CallerOf, ServicesOf
from app.api.openapi import Responses, headers, problems
from app.api.strict_route import StrictRoute
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.uploads import Kind, UploadStatus, name_problem
from app.services.uploads import Chunk, progress_headers
from app.storage.uploads import About

router = APIRouter(tags=["uploads"], route_class=StrictRoute)

Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of all bytes, in hexadecimal")]
CONTENT_RANGE = re.compile(r"bytes +(?:(?P<first>[0-9]{1,18})-(?P<last>[0-9]{1,18})|\*)/(?P<total>[0-9]{1,18})")
HEADERS = headers(
    Upload_Offset="Number of bytes that are there, from the first",
    Upload_Length="Number of bytes of the whole upload",
    Upload_Complete="`?1` once all bytes are there and were checked, else `?0`",
)
STATUS: Responses = {200: {"description": "How much is there", "headers": HEADERS}}
TAKEN: Responses = {
    200: {"description": "The upload was complete already", "headers": HEADERS},
    201: {
        "description": "The upload is complete",
        "model": UploadStatus,
        "headers": {**HEADERS, **headers(Location="Where its status is")},
    },
    202: {"description": "More bytes are to come", "model": UploadStatus, "headers": HEADERS},
    **problems(409, 507),
}
ROW = '{"text": "a row", "label": 0}\n'
BODY: dict[str, Any] = {
    "requestBody": {
        "description": "The bytes that `Content-Range` names, or all of them",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": ROW}},
    }
}


@router.put("/uploads/{sha256}", responses=TAKEN, openapi_extra=BODY)
async def put_upload(
    sha256: Digest,
    request: Request,
    response: Response,
    services: ServicesOf,
    caller: CallerOf,
    kind: Annotated[Kind, Query(description="`folder` for the manifest of a folder's files")] = "file",
    name: Annotated[
        str | None, Query(description="Name of a file, as `train.jsonl`; its ending says the format")
    ] = None,
    content_range: Annotated[
        str | None,
        Header(description="`bytes FIRST-LAST/TOTAL`; `bytes */TOTAL`, without a body, finishes an upload"),
    ] = None,
) -> UploadStatus:
    """Send an upload, or the next bytes of it. Once all are there, they are compared with the SHA-256 and checked.

    Without `Content-Range` the body is the whole upload. With it, the bytes must begin where those that are there end:
    else 409 with `wrong_offset`, and `Upload-Offset` says where to go on. What a broken request has brought is kept.
    A folder is uploaded as its files, then its manifest, `{"files": {"config.json": "<sha256>", …}}`.
    """
    encodings = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
    if encodings not in ("", "identity"):
        detail = f"Content-Encoding is '{encodings[:100]}'; send the bytes as they are"
        raise ProblemError(Problem.UNSUPPORTED_MEDIA_TYPE, detail, None, **{"Accept-Encoding": "identity"})
    chunk = _chunk(content_range, request.headers.get("content-length"))
    about = About(kind=kind, name=_checked_name(kind, name), bytes=chunk.total)
    status, is_new = await services.uploads.put(caller.tenant, sha256, about, chunk, _body(request))
    response.status_code = 201 if is_new else 200 if status.complete else 202
    if is_new:
        response.headers["Location"] = f"/uploads/{sha256}"
    response.headers.update(progress_headers(status))
    return status


@router.get("/uploads/{sha256}", responses=STATUS)
def get_upload(sha256: Digest, response: Response, services: ServicesOf, caller: CallerOf) -> UploadStatus:
    """Say how much of an upload is there. Only the tenant that sends it sees it."""
    status = services.uploads.get(caller.tenant, sha256)
    response.headers.update(progress_headers(status))
    response.headers["Cache-Control"] = "no-store"
    return status


@router.delete("/uploads/{sha256}", status_code=204, responses=problems(409))
def delete_upload(sha256: Digest, services: ServicesOf, caller: CallerOf) -> None:
    """Forget an upload. 409 while a job that waits or runs names it. Folders that have its file keep it."""
    services.uploads.delete(caller.tenant, sha256)


def _chunk(content_range: str | None, content_length: str | None) -> Chunk:
    """Return what the headers say of the body. Raises ProblemError."""
    length = int(content_length) if content_length is not None else None
    if content_range is None:
        if length is None:
            detail = "the body says no length; send Content-Length, or Content-Range: bytes FIRST-LAST/TOTAL"
            raise ProblemError(Problem.MALFORMED, detail)
        return Chunk(0, length, length, anew=True)
    found = CONTENT_RANGE.fullmatch(content_range.strip())
    if found is None:
        raise _malformed("write it as bytes FIRST-LAST/TOTAL, in digits alone, or as bytes */TOTAL without a body")
    total = int(found["total"])
    if found["first"] is None:
        if length:
            raise _malformed("it names no bytes, and the request has a body")
        return Chunk(None, 0, total, anew=False)
    first, last = int(found["first"]), int(found["last"])
    if not first <= last < total:
        raise _malformed("FIRST is at most LAST, and LAST is less than TOTAL")
    if length is not None and length != last - first + 1:
        raise _malformed(f"it names {last - first + 1} bytes, and the body has {length}")
    return Chunk(first, last - first + 1, total, anew=False)


def _malformed(message: str) -> ProblemError:
    errors = [FieldError(field="content-range", message=message)]
    return ProblemError(Problem.MALFORMED, f"Content-Range: {message}", errors)


def _checked_name(kind: Kind, name: str | None) -> str | None:
    """Return the file's name. Raises ProblemError when there is none, or one that is not taken."""
    if kind == "folder":
        if name is None:
            return None
        why = "a folder has no name; leave it out"
    elif name is None:
        why = "is missing; its ending says the file's format: ?name=train.jsonl"
    else:
        problem = name_problem(name)
        if problem is None:
            return name
        why = problem
    raise ProblemError(Problem.UPLOAD_REFUSED, f"name: {why}", [FieldError(field="name", message=why)])


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.stream():
            yield part
    except ClientDisconnect as error:  # nobody is there to hear it
        raise ProblemError(Problem.MALFORMED, "the body ended early") from error
