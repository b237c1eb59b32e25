"""Refuses what a tenant may not take, and what would fill the disk of the data folder, before it is begun."""

from collections.abc import Iterator
from contextlib import contextmanager

from app.contracts.errors import FieldError, Problem, ProblemError
from app.contracts.limits import Limits, NoRoom, QueueFull, StorageFull, TenantLimits
from app.storage.artifacts.store import ArtifactStore
from app.storage.statistics.folder import StatisticsFolders
from app.storage.uploads import UploadFolders
from app.storage.usage import Usage

RETRY_S = 10  # a job of the tenant may have started by then


class Room:
    """Tells how much room there is, and makes some where it runs short. It may block.

    Args:
        min_free_bytes: room that is kept free.
    """

    def __init__(
        self,
        usage: Usage,
        artifacts: ArtifactStore,
        statistics: StatisticsFolders,
        uploads: UploadFolders,
        limits: TenantLimits,
        min_free_bytes: int,
    ) -> None:
        self._usage = usage
        self._uploads = uploads
        self._limits = limits
        self._artifacts = artifacts
        self._statistics = statistics
        self._min_free = min_free_bytes

    def left(self, wanted: int) -> int:
        """Return how many bytes all waiting and running jobs may take on the disk, with `wanted` more.

        What announced uploads still lack is left to them. Where the rest is too little, the statistics that were used
        longest ago make room, if that is enough.
        """
        reserved = self._usage.reserved()
        kept = self._min_free + self._uploads.missing_bytes()
        left = self._artifacts.free_bytes() - kept
        if reserved + wanted <= left:
            return left
        # Running jobs have written a part of theirs already. What a crash left is nobody's, and soon removed.
        written = min(self._artifacts.assembled_bytes(), reserved)
        missing = reserved + wanted - left - written
        if missing > 0 and self._statistics.make_room(missing):
            left = self._artifacts.free_bytes() - kept
        return left + written

    def require(self, wanted: int) -> None:
        """Raise ProblemError where there is no room for so many more bytes."""
        reserved, left = self._usage.reserved(), self.left(wanted)
        if reserved + wanted > left:
            raise _problem(NoRoom(wanted, reserved, left))

    def uploaded(self, tenant: str) -> int:
        """Return the bytes of a tenant's uploads, which are measured only where there is a limit."""
        most = self._limits.of(tenant).stored_bytes
        return 0 if most is None else self._uploads.of(tenant).stored_bytes()

    @contextmanager
    def deciding(self, tenant: str) -> Iterator[None]:
        """Let no other job and no upload of the tenant be taken for the same room of its own.

        Raises OSError when the disk is full, or cannot be written.
        """
        if self._limits.of(tenant).stored_bytes is None:
            yield
        else:
            with self._uploads.of(tenant).announcing():
                yield

    def require_for_upload(self, tenant: str, more: int) -> None:
        """Raise ProblemError where the tenant may not have so many more bytes of uploads, or the disk has no room.

        Args:
            more: bytes by which an upload is larger than it was announced before; 0 for one that goes on.
        """
        most, used = self._limits.of(tenant).stored_bytes, self._usage.of(tenant) + self.uploaded(tenant)
        if most is not None and more > 0 and used + more > most:
            raise _problem(StorageFull(most, used, more))
        self.require(more)


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
            detail = f"{error}; delete jobs and uploads that are not needed any more"
            return ProblemError(Problem.STORAGE_FULL, detail)
        case NoRoom():
            detail = (
                f"{error}; delete jobs or wait for others to end, or give the service a larger disk or a smaller "
                "MASKMERGE_MIN_FREE_BYTES"
            )
            return ProblemError(Problem.NO_SPACE, detail)
