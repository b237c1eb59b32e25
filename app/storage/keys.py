"""The names of everything that Redis holds of jobs."""

import hashlib
from dataclasses import dataclass

from app.contracts.jobs import TaskId


@dataclass(frozen=True)
class Keys:
    """Names of keys, all below one prefix."""

    prefix: str

    def record(self, job_id: str) -> str:
        """Hash of a job's record, without its result."""
        return self._key("job", job_id)

    def result(self, job_id: str) -> str:
        """A succeeded job's result, as JSON. Releases that had no such key kept it in the record."""
        return self._key("result", job_id)

    def events(self, job_id: str) -> str:
        """Stream of a job's events of status and log."""
        return self._key("events", job_id)

    def progress(self, job_id: str) -> str:
        """Stream of a job's events of progress."""
        return self._key("progress", job_id)

    def gone(self, job_id: str) -> str:
        """Why a job that was there is not any more."""
        return self._key("gone", job_id)

    def task(self, task: TaskId) -> str:
        """Hash of a task: its state, attempt, losses, worker, and the message that carried it last."""
        return self._key("task", str(task))

    def idempotency(self, key: str) -> str:
        """The job that an Idempotency-Key made. The key is digested, since it may hold any text."""
        return self._key("idempotency", hashlib.sha256(key.encode()).hexdigest())

    @property
    def jobs(self) -> str:
        """Sorted set of all job ids, which sort by time."""
        return self._key("jobs")

    @property
    def due(self) -> str:
        """Waiting tasks, by when they were last handed to RQ."""
        return self._key("due")

    @property
    def leases(self) -> str:
        """Running tasks, by when their lease ends."""
        return self._key("leases")

    @property
    def deadlines(self) -> str:
        """Active tasks of jobs that have a deadline, by it."""
        return self._key("deadlines")

    @property
    def workers(self) -> str:
        """Live workers, by when they count as gone."""
        return self._key("workers")

    def _key(self, *parts: str) -> str:
        return ":".join((self.prefix, *parts))
