"""Refuses what a tenant may not take, and what would fill the disk of the data folder, before it is begun."""

from collections.abc import Iterator
from contextlib import contextmanager

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.limits import Limits, NoRoom, QueueFull, StorageFull
from app.storage.artifacts.store import ArtifactStore
from app.storage.statistics import StatisticsFolders
from app.storage.usage import Usage

RETRY_S = 10  # a job of the tenant may have started by then


class Room:
    """Tells how much room there is, and makes some where it runs short. It may block.

    Args:
        min_free_bytes: room that is kept free.
    """

    def __init__(
        self, usage: Usage, artifacts: ArtifactStore, statistics: StatisticsFolders, min_free_bytes: int
    ) -> None:
        self._usage = usage
        self._artifacts = artifacts
        self._statistics = statistics
        self._min_free = min_free_bytes

    def left(self, wanted: int) -> int:
        """Return how many bytes all waiting and running jobs may take on the disk, with `wanted` more.

        Where these are too many, the statistics that were used longest ago make room, if that is enough.
        """
        needed = self._usage.reserved() + wanted
        left = self._artifacts.free_bytes() - self._min_free
        if needed > left:
            left += self._artifacts.assembled_bytes()  # running jobs have written a part of theirs already
        if needed > left and self._statistics.make_room(needed - left):
            left = self._artifacts.free_bytes() - self._min_free + self._artifacts.assembled_bytes()
        return left

    def require(self, wanted: int) -> None:
        """Raise ProblemError where there is no room for so many more bytes."""
        reserved, left = self._usage.reserved(), self.left(wanted)
        if reserved + wanted > left:
            raise _problem(NoRoom(wanted, reserved, left))

    def store(self, tenant: str, wanted: int) -> None:
        """Count bytes that are going to be stored for a tenant. Give them back with `Usage.add` of less than 0.

        Raises ProblemError where the disk has no room for them, or the tenant may not have as many.
        """
        with refusing():
            self._usage.add(tenant, wanted, self.left(wanted))


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what stands against a new job, or against more bytes, into a ProblemError."""
    try:
        yield
    except (QueueFull, StorageFull, NoRoom) as error:
        raise _problem(error) from error


def require_priority(limits: Limits, priority: int) -> None:
    """Raise ProblemError where the tenant may not ask for this priority."""
    if priority > limits.priority:
        message = f"is {priority}, and the tenant may ask for at most {limits.priority}"
        detail = f"priority: {message}"
        raise ProblemError(Problem.INVALID_REQUEST, detail, [FieldError(field="priority", message=message)])


def _problem(error: QueueFull | StorageFull | NoRoom) -> ProblemError:
    match error:
        case QueueFull():
            fields = {
                "Retry-After": str(RETRY_S),
                "RateLimit-Policy": f'"queued-jobs";q={error.limit};qu="jobs"',
                "RateLimit": f'"queued-jobs";r={max(0, error.limit - error.used)}',
            }
            detail = f"{error}; wait until one of them has started, or cancel one"
            return ProblemError(Problem.QUEUE_FULL, detail, None, **fields)
        case StorageFull():
            detail = f"{error}; delete jobs whose artifacts are not needed any more"
            return ProblemError(Problem.STORAGE_FULL, detail)
        case NoRoom():
            detail = (
                f"{error}; delete jobs or wait for others to end, or give the service a larger disk or a smaller "
                "MASKMERGE_MIN_FREE_BYTES"
            )
            return ProblemError(Problem.NO_SPACE, detail)
