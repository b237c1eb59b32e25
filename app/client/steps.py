"""What takes several requests, written once for both clients.

An operation is a generator. It yields what is to be done next, such as sending a request or waiting, and gets the
result; a failure is raised where it yielded. `Client` and `AsyncClient` do these steps, each in its way.
"""

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from httpx_sse import ServerSentEvent
from pydantic import ValidationError

from app.client import calls
from app.client.calls import Call
from app.client.errors import ClientError, NoService, Refused, TimedOut, Unreachable
from app.contracts.events import KINDS, Event, EventKind, LogEntry
from app.contracts.jobs import Job, JobPage
from app.contracts.scores import ScoresPage
from worker.engine.catalog.primitives.strict import IGNORE_UNKNOWN

RECONNECT_S = 1.0
MOST_DIGITS = 18  # of an event's number
LONGEST_POLL_S = 10  # less than the time that an answer has to begin
PATIENCE_S = 60.0  # a service that is started again is back by then
AGAIN = (429, 502, 503, 504)  # statuses after which the same request may succeed


@dataclass(frozen=True)
class Send:
    """Send a request, and return what its answer says."""

    call: Call[Any]


@dataclass(frozen=True)
class Open:
    """Send a request, and return its answer, whose content is then read with `Next`. It closes an earlier one."""

    call: Call[None]
    as_events: bool = False


class Next:
    """Return the next bytes or the next server-sent event of the answer that is open; None at its end."""


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Do:
    """Run a function that may block, and return its result."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Hand an item to who iterates, or the only result to who waits."""

    item: Any


Step = Send | Open | Next | Sleep | Do | Emit
Steps = Generator[Step, Any, None]


def proceed(operation: Steps, found: Any = None, error: Exception | None = None) -> Step | None:
    """Hand an operation what its last step found, or how it failed, and return its next step; None at its end."""
    try:
        return operation.send(found) if error is None else operation.throw(error)
    except StopIteration:
        return None


class Patience:
    """Tells how long to wait for a service that is away, and when to give up."""

    def __init__(self) -> None:
        self._away_since: float | None = None

    def reset(self) -> None:
        self._away_since = None

    def pause_s(self, error: ClientError) -> float:
        """Return the seconds until the next try. Raises the error if it will not pass, or lasts for too long."""
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        passes = isinstance(error, Unreachable) or (isinstance(error, Refused) and error.status in AGAIN)
        asked = error.retry_after_s if isinstance(error, Refused) else None
        pause = max(RECONNECT_S, asked or 0.0)
        if not passes or now + pause - self._away_since > PATIENCE_S:
            raise error
        return pause


def each_job(status: str | None, labels: Mapping[str, str] | None, page_size: int) -> Steps:
    yield from _pages(lambda after: calls.jobs(after, status, labels, page_size))


def each_score(checkpoint: str | None, statistic: str | None, page_size: int) -> Steps:
    yield from _pages(lambda after: calls.scores(after, checkpoint, statistic, page_size))


def _pages(call: Callable[[str | None], Call[Any]]) -> Steps:
    after = None
    while True:
        page: JobPage | ScoresPage = yield Send(call(after))
        for entry in page.data:
            yield Emit(entry)
        after = page.next
        if after is None:
            return


def events(job_id: str, last_event_id: int | None = None) -> Steps:
    yield from _follow(job_id, last_event_id, lambda event: event)


def log(job_id: str, last_event_id: int | None = None) -> Steps:
    yield from _follow(job_id, last_event_id, lambda event: event.data if isinstance(event.data, LogEntry) else None)


def wait(job_id: str, timeout_s: float | None = None) -> Steps:
    """Emit the job once it has ended. Raises TimedOut where it has not within `timeout_s`."""
    if timeout_s is None:
        yield from _follow(job_id, None, lambda event: None)
        yield Emit((yield Send(calls.job(job_id))))
        return
    deadline, patience = time.monotonic() + timeout_s, Patience()
    state = "not known"
    while True:
        pause, left = RECONNECT_S, deadline - time.monotonic()
        try:
            job: Job = yield Send(calls.job(job_id, max(0, min(int(left), LONGEST_POLL_S))))
            if job.status.is_final:
                yield Emit(job)
                return
            state = job.status.value
            patience.reset()
        except (Unreachable, Refused) as error:
            pause = patience.pause_s(error)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(f"job {job_id} has not ended within {timeout_s:g} s; its state is {state}, and it goes on")
        yield Sleep(min(pause, left))


def _follow(job_id: str, last_event_id: int | None, pick: Callable[[Event], Any]) -> Steps:
    """Emit what `pick` returns of each event, to the job's end, however often the connection is lost."""
    patience = Patience()
    while True:
        is_news = False
        pause = RECONNECT_S
        try:
            response = yield Open(calls.events(job_id, last_event_id), as_events=True)
            if response.status_code == 204:
                return
            patience.reset()
            while (received := (yield Next())) is not None:
                if not received.data:  # a comment, which keeps the connection alive, ends as an event does
                    continue
                event = _event(received)
                is_news, last_event_id = True, _number(received)
                item = None if event is None else pick(event)
                if item is not None:
                    yield Emit(item)
        except (Unreachable, Refused) as error:
            pause = patience.pause_s(error)
        if not is_news:
            yield Sleep(pause)


def _number(received: ServerSentEvent) -> int:
    if not (received.id.isascii() and received.id.isdigit() and len(received.id) <= MOST_DIGITS):
        raise NoService(f"an event of the job has the number {received.id[:100]!r}")
    return int(received.id)


def _event(received: ServerSentEvent) -> Event | None:
    """Return the event; None where a newer service tells of what this client does not know."""
    if received.event not in list(EventKind):
        return None
    kind = EventKind(received.event)
    try:
        data = KINDS[kind].model_validate_json(received.data, context=IGNORE_UNKNOWN, extra="ignore")
        return Event(id=_number(received), event=kind, data=data)
    except ValidationError as error:
        raise NoService(f"an event of the job is not as this client knows it: {error}") from error
