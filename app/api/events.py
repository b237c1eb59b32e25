import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import AfterValidator, Field
from redis.exceptions import RedisError

from app.api.authentication import authenticate
from app.api.dependencies import JobId, RecordOf, ServicesOf
from app.api.openapi import Responses
from app.api.strict_route import StrictRoute
from app.contracts.api_keys import Scope
from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.events import Event, LogEntry
from app.contracts.jobs import Progress
from app.contracts.printable import printable

KEY_HOLDS_S = 10.0  # an event later than this is sent only if the reader's key is still valid

router = APIRouter(tags=["jobs"], route_class=StrictRoute)

logger = logging.getLogger(__name__)


def _numbered(event_id: str) -> str:
    if not re.fullmatch("[0-9]{1,15}", event_id):
        raise ValueError("give the id of an event of this job, a number")
    return event_id


Numbered = Annotated[str, AfterValidator(_numbered), Field(json_schema_extra={"pattern": "^[0-9]{1,15}$"})]
LastEventId = Annotated[Numbered | None, Header(description="The last event that is known")]


async def get_position(record: RecordOf, response: Response, last_event_id: LastEventId = None) -> int | None:
    """Return the event to go on after; None, and a 204, when the job has ended and its last event is known."""
    after = int(last_event_id or 0)
    if after > record.revision:
        message = f"job {record.id} has no event {after} yet"
        raise ProblemError(Problem.MALFORMED, message, [FieldError(field="last-event-id", message=message)])
    if record.status.is_final and after >= record.revision:
        response.status_code = 204
        return None
    return after


@router.get(
    "/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses={204: {"description": "The job has ended and nothing is left to tell; do not reconnect"}},
)
async def events(
    job_id: JobId, after: Annotated[int | None, Depends(get_position)], services: ServicesOf, request: Request
) -> AsyncIterator[ServerSentEvent]:
    """Send a job's events, as server-sent events: from the first, or from the one after `Last-Event-ID`, to its end.

    A reader that loses the connection comes back with `Last-Event-ID` and misses nothing; one that has seen the end
    gets 204. Only the newest thousand events of progress are kept, until an hour after the end.
    """
    if after is None:
        return
    checked = time.monotonic()
    try:
        async for event in services.watcher.follow(job_id, after):
            if time.monotonic() - checked >= KEY_HOLDS_S:
                await run_in_threadpool(authenticate, request, Scope.READ)
                checked = time.monotonic()
            yield ServerSentEvent(event=event.event, id=str(event.id), data=event.data)
    except ProblemError:  # the key was revoked, or expired; the reader hears of it when it comes back
        return
    except RedisError as error:  # the answer has begun; the reader comes back and hears of it then
        logger.warning("the events of job %s are cut short, Redis is away: %s", job_id, error)


TEXT: Responses = {
    200: {"description": "A line for each event", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/jobs/{job_id}/log", response_class=PlainTextResponse, responses=TEXT)
def log(record: RecordOf, services: ServicesOf) -> PlainTextResponse:
    """Return a job's log up to now as text: its changes of status and its messages, a line each.

    `GET /jobs/{job_id}/events` sends the same as they come, and progress too.
    """
    lines = [f"{_line(event)}\n" for event in services.store.log.read(record.id)]
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return PlainTextResponse("".join(lines), headers=headers)


def _line(event: Event) -> str:
    """Return an event as a line. Characters that would end the line, or steer a terminal, are escaped."""
    data = event.data
    assert not isinstance(data, Progress)  # noqa: S101 - for the type checker: it is in another stream
    if isinstance(data, LogEntry):
        text = f"{data.code}: {data.message}"
    else:
        text = data.status if data.error is None else f"{data.status}: {data.error.code}: {data.error.message}"
    time = data.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"{time} attempt {data.attempt} {printable(text)}"
