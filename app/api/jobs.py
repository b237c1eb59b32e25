import hashlib
import time
from itertools import islice
from math import ceil
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from app.api.conditional import PreconditionsOf, not_modified
from app.api.dependencies import CallerOf, RecordOf, ServicesOf, no_job, read_again
from app.api.openapi import ETAG, NOT_MODIFIED, headers, problems
from app.api.paging import Limit
from app.api.prefer import Wait, applied
from app.api.strict_route import StrictRoute
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.jobs import Job, JobPage, Record, Status
from app.storage.records import Deleted

router = APIRouter(tags=["jobs"], route_class=StrictRoute)

Label = Annotated[str, Field(description="key:value", json_schema_extra={"pattern": "^[^:]*:"})]
SHOWN = {
    **ETAG,
    **headers(
        Preference_Applied="Which preference of `Prefer` was honoured, if any",
        Retry_After="Seconds after which to ask again, of a job that has not ended",
    ),
}
SOONEST_S, LATEST_S = 1, 60  # a poll costs little, and a person waits


@router.get("/jobs")
def list_jobs(
    services: ServicesOf,
    caller: CallerOf,
    status: Annotated[Status | None, Query(description="Only jobs in this state")] = None,
    label: Annotated[list[Label] | None, Query(description="Only jobs with this label; repeatable")] = None,
    limit: Limit = 20,
    after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{28}$", description="The `next` of the page before")] = None,
) -> JobPage:
    """List jobs, newest first, in short: without their requests, and without the candidates and trials of a search."""
    labels = [_label(text) for text in label or ()]
    found = list(islice(services.store.records.newest(after, status, labels, caller.tenant), limit + 1))
    page = found[:limit]
    return JobPage(data=[job.public() for job in page], next=page[-1].id if len(found) > limit else None)


@router.get("/jobs/{job_id}", response_model=Job, responses={200: {"headers": SHOWN}, 304: NOT_MODIFIED})
async def get_job(
    record: RecordOf,
    services: ServicesOf,
    response: Response,
    wait: Wait,
    preconditions: PreconditionsOf,
) -> Job | Response:
    """Return a job. Its ETag changes with every write; `If-None-Match` is answered with 304 while it has not.

    `Prefer: wait=N` waits up to N (at most 60) seconds: until the job differs from the version that `If-None-Match`
    names, or, without that header, until a job that has not ended changes.
    """
    lacking = await run_in_threadpool(services.jobs.waiting_for, record)
    is_known = preconditions.is_current(_etag(record, lacking))
    if wait is not None and (is_known or (not preconditions.names_known and not record.status.is_final)):
        await services.watcher.change(record.id, record.revision, wait)
        record = await run_in_threadpool(read_again, record, services)
        lacking = await run_in_threadpool(services.jobs.waiting_for, record)
    etag, later = _etag(record, lacking), _retry_after(record)
    if preconditions.is_current(etag):
        return not_modified(etag, {**applied(wait), **later})
    response.headers.update({"ETag": etag, "Cache-Control": "no-cache", **applied(wait), **later})
    return record.public(lacking)


@router.post("/jobs/{job_id}/cancel", status_code=202, responses=problems(409))
def cancel_job(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> Job:
    """Cancel a job: at once while it waits, within 5 s while it runs. 409 when it has succeeded or failed."""
    preconditions.check(_etag(record, services.jobs.waiting_for(record)))
    status = services.store.records.cancel(record.id)
    if status is Status.CANCELLED:  # it waited; if it runs, its worker removes the trials
        services.searches.remove(record.id)
    if status in (Status.SUCCEEDED, Status.FAILED):
        raise ProblemError(Problem.CONFLICT, f"job {record.id} has {status.value} already")
    return read_again(record, services).public()


@router.post("/jobs/{job_id}/retry", status_code=202, responses=problems(409))
def retry_job(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> Job:
    """Queue a failed or cancelled job again, as a new attempt. 409 when it is neither."""
    preconditions.check(_etag(record, services.jobs.waiting_for(record)))
    again = services.jobs.retry(record.id, record.tenant)
    if again is None:
        current = read_again(record, services)
        detail = f"job {record.id} is {current.status.value}; only a failed or cancelled job can be tried again"
        raise ProblemError(Problem.CONFLICT, detail)
    return again.public(services.jobs.waiting_for(again))


@router.delete("/jobs/{job_id}", status_code=204, responses=problems(409))
def delete_job(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> None:
    """Remove a job that has ended: its record and its artifact. 409 while it is active; 404 when it is removed already.

    Downloads that have begun go on to their end.
    """
    preconditions.check(_etag(record, services.jobs.waiting_for(record)))
    deleted = services.store.records.delete(record.id)
    if deleted is Deleted.NOT_ENDED:
        current = read_again(record, services)
        raise ProblemError(Problem.CONFLICT, f"job {record.id} is {current.status.value}; cancel it first")
    if deleted is Deleted.NO_SUCH_JOB:
        raise no_job(record.id, record.tenant, services)
    # The record went first, so that no reader finds one without its artifact; what a crash leaves is swept.
    if record.artifact is not None:
        services.artifacts.remove(record.artifact)
    services.searches.remove(record.id)


def _etag(record: Record, waiting_for: str | None) -> str:
    """Return the tag of a job as it is shown, with what it waits for, which changes without a write."""
    lacking = f"-{hashlib.sha256(waiting_for.encode()).hexdigest()[:8]}" if waiting_for else ""
    return f'"{record.id}-{record.revision}{lacking}"'


def _retry_after(record: Record) -> dict[str, str]:
    """Return the header that says when to ask again; none for a job that has ended.

    Of a running job it is the time that is left, as far as that is known. What has taken long will take longer, so a
    tenth of the time is waited where it is not.
    """
    if record.status.is_final:
        return {}
    left: float | None = SOONEST_S
    if record.status is not Status.CANCELLING:
        left = record.progress.eta_seconds
    if left is None:
        started = record.started_ms if record.status is Status.RUNNING else None
        since = record.created_ms if started is None else started
        left = (time.time() - since / 1000) / 10
    return {"Retry-After": str(ceil(min(max(left, SOONEST_S), LATEST_S)))}


def _label(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        message = f"'{text}' is no label; write key:value"
        raise ProblemError(Problem.MALFORMED, message, [FieldError(field="label", message=message)])
    return key, value
