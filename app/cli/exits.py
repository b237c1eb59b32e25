"""How commands end: exit statuses, and the messages that come with them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.client import Job


class Exit(IntEnum):
    OK = 0
    """The command did what it was asked; a job that was waited for succeeded, and was not refused by `accept`."""
    ERROR = 1
    """The service refused the request, or a file of this machine cannot be read or written."""
    USAGE = 2
    """The command line, or a setting, is wrong."""
    FAILED = 3
    """The job failed."""
    CANCELLED = 4
    """The job was cancelled."""
    NOT_ACCEPTED = 5
    """The job succeeded, and its merge does not reach what the recipe asks for (`accept`, `must_beat`)."""
    UNREACHABLE = 6
    """No service answers at the URL."""
    NEWER_DATA = 7
    """A newer release has written the data folder, or what Redis holds."""
    NOT_PUBLISHED = 8
    """The job succeeded, and not every place that the recipe names has its merge."""
    INTERRUPTED = 130
    """Ctrl-C."""


class Stop(Exception):
    """Ends the command with a message and an exit status."""

    def __init__(self, message: str, status: Exit = Exit.ERROR) -> None:
        super().__init__(message)
        self.status = status


def outcome(job: "Job") -> Exit:
    """Return the exit status of a command that waited for the job, which has ended."""
    from app.client import MergeResult, Status

    if job.status is Status.FAILED:
        return Exit.FAILED
    if job.status is Status.CANCELLED:
        return Exit.CANCELLED
    if not isinstance(job.result, MergeResult):
        return Exit.OK
    if job.result.accepted is False:
        return Exit.NOT_ACCEPTED
    has_failed = any(found.outcome == "failed" for found in job.result.published)
    return Exit.NOT_PUBLISHED if has_failed else Exit.OK


SIGNS = {
    "CERTIFICATE_VERIFY_FAILED": "SSL_CERT_FILE names the file of a private authority",
    "WRONG_VERSION_NUMBER": "what listens there speaks no TLS, so its URL begins with http://",
    "RECORD_LAYER_FAILURE": "what listens there speaks no TLS, so its URL begins with http://",
    "without sending a response": "something listens there; if it speaks TLS, its URL begins with https://",
}
"""What to do about a service that does not answer, by what the libraries say of the connection."""


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """End the command with a message when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stop(message, Exit.INTERRUPTED) from error


def explained(error: Exception) -> Stop | None:
    """Return how an error ends a command; None for one that is a fault of this program."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, OSError):
        return Stop(str(error))
    if "app.client" not in sys.modules:
        return None
    from app.client import ClientError, NoService, Refused, Unreachable

    if isinstance(error, Refused):
        hint = "; commands take the API key from MASKMERGE_API_KEY" if error.code == "unauthenticated" else ""
        return Stop(error.detail + hint + (f" (request {error.request_id})" if error.request_id else ""))
    if isinstance(error, Unreachable):
        hints = (hint for sign, hint in SIGNS.items() if sign in str(error))
        return Stop(f"{error}; {next(hints, '`maskmerge serve` starts a service')}", Exit.UNREACHABLE)
    if isinstance(error, NoService):
        return Stop(str(error), Exit.UNREACHABLE)
    return Stop(str(error)) if isinstance(error, ClientError) else None
