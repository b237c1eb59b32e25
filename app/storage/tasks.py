"""Tasks: some wait for a worker, some run under a lease, which shows whether their worker is still at it."""

from collections.abc import Sequence
from typing import cast

from redis import Redis

from app.contracts.jobs import Attempt, ErrorCode, JobError, PhaseName, Progress, Status, TaskId, TaskState
from app.storage.keys import Keys
from app.storage.scripts import JobScripts, flat, listed
from worker.engine.catalog.contracts.report import MergeResult, MergeSummary, ScoreResult


class Tasks:
    """Stores tasks, and by them changes the records of their jobs. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
        lease_seconds: time for which an attempt is ours without renewing its lease.
        max_losses: number of times that a task may lose its worker before its job fails.
    """

    def __init__(self, redis: Redis, keys: Keys, scripts: JobScripts, lease_seconds: float, max_losses: int) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts
        self.lease_seconds = lease_seconds
        self._lease_ms = int(lease_seconds * 1000)
        self._max_losses = max_losses

    def claim(self, task: TaskId, worker: str) -> Attempt | None:
        """Start an attempt. Returns None when the task does not wait (done, running elsewhere, cancelled, deleted)."""
        number = self._scripts.run(
            "claim",
            task.job,
            [self._keys.task(task), self._keys.due, self._keys.leases],
            [str(task), self._lease_ms, worker, Progress(phase=PhaseName.LOADING).model_dump_json()],
        )
        return Attempt(task=task, number=int(number)) if number else None

    def renew(self, attempt: Attempt, progress: Progress | None = None) -> Status | None:
        """Extend the lease and perhaps record progress. Returns the job's status; None when the attempt is not ours."""
        status = self._scripts.run(
            "renew",
            attempt.task.job,
            [self._keys.task(attempt.task), self._keys.leases],
            [
                str(attempt.task),
                attempt.number,
                self._lease_ms,
                "" if progress is None else progress.model_dump_json(),
            ],
        )
        return Status(status) if status else None

    def succeed(self, attempt: Attempt, result: MergeResult | ScoreResult, artifact: str) -> bool:
        """End the job with success. Returns False when the attempt is no longer ours; its artifact must go then."""
        in_short = set(MergeSummary.model_fields) if isinstance(result, MergeResult) else None
        return self._end(
            attempt,
            Status.SUCCEEDED,
            {"summary": result.model_dump_json(include=in_short), "artifact": artifact},
            Progress(phase=PhaseName.DONE, done=1, total=1, unit="jobs", fraction=1.0, eta_seconds=0.0),
            result,
        )

    def fail(self, attempt: Attempt, error: JobError) -> bool:
        """End the job with an error. Returns False when the attempt is no longer ours."""
        return self._end(attempt, Status.FAILED, {"error": error.model_dump_json()})

    def acknowledge_cancel(self, attempt: Attempt) -> bool:
        """End the job as cancelled. Returns False when nobody asked for it, or when the attempt is no longer ours."""
        return self._end(attempt, Status.CANCELLED, {})

    def release(self, attempt: Attempt, *, lost: bool, only_expired: bool = False) -> bool:
        """Put the task back in the queue; a task that is `lost` too often fails its job instead.

        Returns False when there was nothing to release: the attempt ended, or (`only_expired`) its lease was renewed.
        """
        error = JobError(
            code=ErrorCode.WORKER_LOST,
            message=f"the job lost its worker {self._max_losses} times; the last attempt was {attempt.number}",
            retryable=True,
        )
        outcome = self._scripts.run(
            "release",
            attempt.task.job,
            [self._keys.task(attempt.task), self._keys.leases, self._keys.due],
            [
                str(attempt.task),
                attempt.number,
                int(lost),
                self._max_losses,
                int(only_expired),
                Progress().model_dump_json(),
                error.model_dump_json(),
            ],
        )
        return bool(outcome)

    def expired(self) -> list[Attempt]:
        """Return the running attempts whose lease ran out."""
        names = cast(list[str], self._redis.zrangebyscore(self._keys.leases, "-inf", self._scripts.clock()))
        attempts = []
        for name in names:
            task = TaskId.parse(name)
            number = self._redis.hget(self._keys.task(task), "attempt")
            if number is not None:
                attempts.append(Attempt(task=task, number=int(number)))
        return attempts

    def attempt_is_current(self, task: TaskId, number: int) -> bool | None:
        """Return whether this attempt is running; None when nothing is known of the job."""
        state, attempt = cast(list[str | None], self._redis.hmget(self._keys.task(task), "state", "attempt"))
        if state is None or attempt is None:
            return None
        return state == TaskState.RUNNING and int(attempt) == number

    def due(self, dispatched_before_ms: int) -> list[TaskId]:
        """Return the waiting tasks that were not handed to RQ since then."""
        names = cast(list[str], self._redis.zrangebyscore(self._keys.due, "-inf", dispatched_before_ms))
        return [TaskId.parse(name) for name in names]

    def dispatched(self, task: TaskId, message: str) -> None:
        """Note that RQ has the task, in its job `message`."""
        self._redis.zadd(self._keys.due, {str(task): self._scripts.clock()}, xx=True)
        self._redis.hset(self._keys.task(task), "message", message)

    def message(self, task: TaskId) -> str | None:
        """Return the id of the RQ job that carried the task last."""
        return cast(str | None, self._redis.hget(self._keys.task(task), "message"))

    def _end(
        self,
        attempt: Attempt,
        status: Status,
        fields: dict[str, str],
        progress: Progress | None = None,
        result: MergeResult | ScoreResult | None = None,
    ) -> bool:
        notes: Sequence[str] = () if result is None else result.notes
        done = self._scripts.run(
            "finish",
            attempt.task.job,
            [self._keys.task(attempt.task), self._keys.leases],
            [
                str(attempt.task),
                attempt.number,
                listed(status.predecessors),
                status,
                "" if progress is None else progress.model_dump_json(),
                "" if result is None else result.model_dump_json(),
                len(notes),
                *notes,
                *flat(fields),
            ],
        )
        return bool(done)
