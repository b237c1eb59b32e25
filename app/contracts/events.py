"""Events of a job, as its watchers see them. The union is closed: a reader that knows these three kinds knows all."""

from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict

from app.contracts.jobs import JobError, Progress, Status


class EventKind(StrEnum):
    STATUS = "status"
    PROGRESS = "progress"
    LOG = "log"


class LogCode(StrEnum):
    ATTEMPT_STARTED = "attempt_started"
    ATTEMPT_LOST = "attempt_lost"
    ATTEMPT_HANDED_BACK = "attempt_handed_back"
    SCORING_CUT = "scoring_cut"
    SHARDS_DONE = "shards_done"
    DELIVERY_DROPPED = "delivery_dropped"
    NOTE = "note"


class StatusChange(BaseModel):
    """The job entered a state; `error` says why when it is `failed`."""

    status: Status
    attempt: int
    error: JobError | None
    at: AwareDatetime


class LogEntry(BaseModel):
    """A message for people about something that the status does not show."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    code: LogCode
    attempt: int
    message: str
    """Text for people; it holds nothing of the rows."""
    at: AwareDatetime


KINDS: dict[EventKind, type[StatusChange] | type[Progress] | type[LogEntry]] = {
    EventKind.STATUS: StatusChange,
    EventKind.PROGRESS: Progress,
    EventKind.LOG: LogEntry,
}


class Event(BaseModel):
    """Event `id` made the record what it is at revision `id`."""

    id: int
    event: EventKind
    data: StatusChange | Progress | LogEntry
