"""The list of jobs, and a job's page with its progress, events, report, downloads and recipe."""

from datetime import datetime
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from app.api import artifacts, jobs
from app.api.conditional import Preconditions, PreconditionsOf
from app.api.dependencies import CallerOf, RecordOf, ServicesOf
from app.contracts.errors import Problem, ProblemError
from app.contracts.events import Event, LogEntry
from app.contracts.jobs import JobKind, PhaseName, Progress, Record, Status
from app.contracts.predictions import MOST_ROWS
from app.dashboard.pages import page
from app.dashboard.recipes import ways_to_send, without_defaults
from app.dashboard.route import DashboardRoute
from app.services.composition import Services
from worker.engine.catalog.contracts.report import PAGE_POLICY

router = APIRouter(route_class=DashboardRoute, include_in_schema=False)

PAGE = 50
MOST_EVENTS = 100  # newest events of a job that its page shows; GET /jobs/{id}/log has all
ANY_COPY = Preconditions(None, None, None, None)
PHASES = [name for name in PhaseName if name not in (PhaseName.QUEUED, PhaseName.DONE)]


@router.get("/")
def list_jobs(
    request: Request,
    services: ServicesOf,
    caller: CallerOf,
    status: Annotated[str | None, Query()] = None,
    label: Annotated[str | None, Query()] = None,
    after: Annotated[str | None, Query(pattern=r"^[0-9a-f]{28}$")] = None,
) -> Response:
    """Show the newest jobs, or those in a state or with a label; the page goes on showing how far they are."""
    if status and status not in set(Status):
        raise ProblemError(Problem.NOT_FOUND, f"jobs are never '{status[:20]}'")
    wanted = Status(status) if status else None
    found = jobs.list_jobs(services, caller, wanted, [label] if label else None, PAGE, after)
    return page(
        request,
        "jobs.html",
        jobs=found.data,
        next=found.next,
        filters={"status": status, "label": label},
        after=after,
        statuses=list(Status),
    )


@router.get("/dashboard/jobs/{job_id}")
def show_job(request: Request, record: RecordOf, services: ServicesOf) -> Response:
    """Show a job; while it is active the page goes on showing how far it is."""
    events = services.store.log.read(record.id)
    recipe = without_defaults(record)
    return page(
        request,
        "job.html",
        job=record.public(),
        is_merge=record.kind is JobKind.MERGE,
        events=[_told(event) for event in reversed(events[-MOST_EVENTS:])],
        earlier=max(0, len(events) - MOST_EVENTS),
        phases=PHASES,
        tasks=None if record.status.is_final else services.store.tasks.of_job(record.id),
        files=_files(record, services),
        most_rows=MOST_ROWS,
        recipe=recipe,
        ways=ways_to_send(recipe, record.kind),
    )


@router.post("/dashboard/jobs/{job_id}/cancel")
def cancel_job(record: RecordOf, services: ServicesOf) -> Response:
    jobs.cancel_job(record, services, ANY_COPY)
    return _back_to(record)


@router.post("/dashboard/jobs/{job_id}/retry")
def retry_job(record: RecordOf, services: ServicesOf) -> Response:
    jobs.retry_job(record, services, ANY_COPY)
    return _back_to(record)


@router.post("/dashboard/jobs/{job_id}/delete")
def delete_job(record: RecordOf, services: ServicesOf) -> Response:
    jobs.delete_job(record, services, ANY_COPY)
    return RedirectResponse("/", 303)


@router.get("/dashboard/jobs/{job_id}/report")
def report(record: RecordOf, services: ServicesOf, preconditions: PreconditionsOf) -> Response:
    """Send the report page, which only pages of the dashboard may frame."""
    response = artifacts.report(record, services, preconditions)
    response.headers["Content-Security-Policy"] = f"{PAGE_POLICY}; frame-ancestors 'self'"
    return response


# The session's cookie counts for the dashboard alone, so what its pages link to has paths of its own.
router.get("/dashboard/jobs/{job_id}/files/{name:path}", response_model=None)(artifacts.get_file)
router.get("/dashboard/jobs/{job_id}/archive", response_model=None)(artifacts.archive)


def _back_to(record: Record) -> Response:
    return RedirectResponse(f"/dashboard/jobs/{record.id}", 303)


def _files(record: Record, services: Services) -> list[tuple[str, int, str]]:
    """Return name, size and path of each file of a job's artifact; none before it has succeeded."""
    if record.status is not Status.SUCCEEDED:
        return []
    listing = artifacts.list_files(record, services)
    return [(file.name, file.bytes, f"/dashboard/jobs/{record.id}/files/{quote(file.name)}") for file in listing.files]


def _told(event: Event) -> tuple[datetime, int, str]:
    """Return time, attempt and words of an event."""
    data = event.data
    assert not isinstance(data, Progress)  # noqa: S101 - for the type checker: it is in another stream
    if isinstance(data, LogEntry):
        return data.at, data.attempt, data.message
    return data.at, data.attempt, str(data.status) if data.error is None else f"{data.status}: {data.error.message}"
