"""Tasks: some wait for a worker, some run under a lease, which shows whether their worker is still at it."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel
from redis import Redis

from app.contracts.devices import ANY, LANES, Device
from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    JobError,
    ModelProgress,
    PhaseName,
    Progress,
    Stage,
    Status,
    TaskId,
    TaskState,
)
from app.contracts.limits import TenantLimits
from app.observability.metrics import counts_of
from app.storage.keys import Keys
from app.storage.scripts import JobScripts, flat, listed
from worker.engine.catalog.contracts.report import MergeResult, MergeSummary, ScoreResult

CLAIM_KEPT_S = 60  # the client sends a claim again within seconds when its answer got lost
ADOPTED_AT_ONCE = 500
SECONDS_OF = "seconds of "
"""Beginning of the names of fields, in the hash of a main task, with the seconds that shards have measured models."""


@dataclass(frozen=True)
class TenantTasks:
    """A tenant's waiting and running tasks. Times are in milliseconds since the epoch; None where there is no task."""

    tenant: str
    waiting_in: Mapping[str, int]
    """Number of waiting tasks in each lane."""
    oldest_waiting_ms: int | None
    """Time at which the job was made that waits and is the oldest."""
    running: int
    first_started_ms: int | None
    """Start of the attempt that has been running for longest."""

    @property
    def waiting(self) -> int:
        return sum(self.waiting_in.values())


@dataclass(frozen=True)
class NewShard:
    """A shard to be made: its model and number of rows, the checkpoint that it reads, and its work, as JSON."""

    model: str
    rows: int
    holds: str
    work: str


@dataclass(frozen=True)
class RunningTask:
    """A task that a worker is at. `model` and numbers of rows are those of a shard; None for the main task."""

    worker: str
    model: str | None = None
    done: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class TasksOfJob:
    """The tasks of one job that run, and the number of shards that wait."""

    running: Sequence[RunningTask]
    waiting_shards: int


class ScoringPhase(BaseModel):
    """The share of a job's progress that belongs to its scoring, from which the job's progress follows in Redis."""

    start: float
    span: float
    total: int
    """Number of rows."""
    least: float
    """Least fraction from which a time that is left can be told."""


@dataclass(frozen=True)
class CutScoring:
    """The scoring of a job, cut into shards.

    Args:
        models: rows of each model, and those of them that are in no shard, because they were done before.
        batch_tokens: see `worker.engine.catalog.contracts.spec.SharedScoring`.
    """

    shards: Sequence[NewShard]
    phase: ScoringPhase
    models: Mapping[str, ModelProgress]
    batch_tokens: Mapping[str, int]


@dataclass(frozen=True)
class ShardsDone:
    """What is known of the shards that a job has had. `goes_on`: the attempt goes on where one was split."""

    goes_on: bool
    elapsed_seconds: float
    seconds: Mapping[str, float]
    """Seconds for which shards have measured each model."""
    batch_tokens: Mapping[str, int]


class Tasks:
    """Stores tasks, and by them changes the records of their jobs. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
        lease_seconds: time for which an attempt is ours without renewing its lease.
        max_losses: number of times that a task may lose its worker before its job fails.
        limits: numbers of tasks that run at once, by tenant.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        scripts: JobScripts,
        lease_seconds: float,
        max_losses: int,
        limits: TenantLimits,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts
        self.lease_seconds = lease_seconds
        self._lease_ms = int(lease_seconds * 1000)
        self._max_losses = max_losses
        running = {"*": limits.default, **limits.tenants}
        self._most_running = json.dumps({tenant: of.active_jobs or 0 for tenant, of in running.items()})

    def claim(self, worker: str, holds: str = "", device: Device = "cpu") -> Attempt | None:
        """Start an attempt at the task that is next. Returns None when none waits that may start now.

        Only tasks of jobs count that ask for the worker's device, or for none. A task of the highest priority is next,
        and among equal ones tenants take turns: who has the fewest running comes first, then who was least recently
        served. Every fourth start goes by turns alone. Of a tenant's tasks,
        the highest priority comes first, then the oldest. Tasks of a tenant that runs as many as it may are left out.
        Where that is a shard, one of the checkpoint that the worker `holds` may be taken in its place.
        """
        self._scripts.check_replicas()  # without them the attempt could not begin, and would count as lost
        claimed = self._scripts.run(
            "claim",
            "",
            [self._keys.claim(secrets.token_hex(8))],
            [
                self._lease_ms,
                worker,
                Progress(phase=PhaseName.LOADING).model_dump_json(),
                self._most_running,
                CLAIM_KEPT_S,
                holds,
                device,
            ],
        )
        if not claimed:
            return None
        task, number = str(claimed).split(" ")
        return Attempt(task=TaskId.parse(task), number=int(number))

    def renew(self, attempt: Attempt, progress: Progress | None = None) -> Status | None:
        """Extend the lease and perhaps record progress. Returns the job's status; None when the attempt is not ours.

        Of a shard's progress, the number of rows counts, and the job's follows from those of all shards.
        """
        told = "" if progress is None else progress.done if attempt.is_of_shard else progress.model_dump_json()
        status = self._scripts.run(
            "renew",
            attempt.task.job,
            [self._keys.task(attempt.task)],
            [
                str(attempt.task),
                attempt.number,
                self._lease_ms,
                told,
            ],
        )
        return Status(status) if status else None

    def split(self, attempt: Attempt, cut: CutScoring) -> bool:
        """End the attempt, and let shards do the job's scoring. Returns False when the job is not to go on."""
        shards = [part for shard in cut.shards for part in (shard.model, shard.rows, shard.holds, shard.work)]
        models = json.dumps({name: of.model_dump() for name, of in cut.models.items()})
        arguments = [cut.phase.model_dump_json(), models, json.dumps(dict(cut.batch_tokens)), *shards]
        return self._write("split", attempt, arguments)

    def finish_shard(self, attempt: Attempt, model: str, seconds: float, rows: int) -> bool:
        """End a shard; the last one of a job lets its main task wait again. Returns False when it is not to go on.

        Args:
            seconds: time for which the shard has measured `model`.
            rows: number of rows of the whole shard.
        """
        return self._write("finish_shard", attempt, [model, seconds, rows])

    def work_of_shard(self, attempt: Attempt) -> str | None:
        """Return what a shard does, as `split` was told it; None when the job is gone."""
        return cast(str | None, self._redis.hget(self._keys.task(attempt.task), "work"))

    def of_job(self, job_id: str) -> TasksOfJob:
        """Return which workers are at a job, and how far the shards are that they make."""
        main = self._keys.task(TaskId(job=job_id, stage=Stage.MERGE))
        state, worker, shards = cast(list[str | None], self._redis.hmget(main, ["state", "worker", "shards"]))
        if state == TaskState.RUNNING:
            return TasksOfJob([RunningTask(worker or "")], 0)
        if state != TaskState.SPLIT:
            return TasksOfJob([], 0)
        with self._redis.pipeline(transaction=False) as reads:
            for number in range(int(shards or 0)):
                shard = self._keys.task(TaskId(job=job_id, stage=Stage.SCORE, shard=number))
                reads.hmget(shard, ["state", "worker", "model", "rows", "rows_in_all"])
            found = cast(list[list[str | None]], reads.execute())
        running = [
            RunningTask(of or "", model, int(done or 0), int(total) if total else None)
            for state, of, model, done, total in found
            if state == TaskState.RUNNING
        ]
        return TasksOfJob(running, sum(state == TaskState.QUEUED for state, *_ in found))

    def shards_done(self, attempt: Attempt) -> ShardsDone:
        """Return what is known of the shards that the job of an attempt at its main task has had."""
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.task(attempt.task)))
        goes_on = fields.get("continues") == str(attempt.number)
        elapsed = int(fields["joined_ms"]) - int(fields["split_ms"]) if goes_on else 0
        of_model = {name: float(value) for name, value in fields.items() if name.startswith(SECONDS_OF)}
        return ShardsDone(
            goes_on=goes_on,
            elapsed_seconds=elapsed / 1000,
            seconds={name.removeprefix(SECONDS_OF): seconds for name, seconds in of_model.items()},
            batch_tokens=json.loads(fields.get("batch_tokens", "{}")),
        )

    def succeed(
        self, attempt: Attempt, result: MergeResult | ScoreResult, artifact: str, artifact_bytes: int = 0
    ) -> bool:
        """End the job with success. Returns False when the attempt is no longer ours; its artifact must go then."""
        in_short = set(MergeSummary.model_fields) if isinstance(result, MergeResult) else None
        return self._end(
            attempt,
            Status.SUCCEEDED,
            {
                "summary": result.model_dump_json(include=in_short),
                "artifact": artifact,
                "artifact_bytes": str(artifact_bytes),
            },
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
            [self._keys.task(attempt.task)],
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

    def startable(self, most: int, lane: str = ANY) -> int:
        """Return the number of tasks waiting in a lane that may start now, at most `most`.

        It may be too high: whether a tenant runs as many tasks as it may is found out by a claim.
        """
        return int(self._scripts.run("startable", "", [], [most, lane]))

    def counts(self) -> list[TenantTasks]:
        """Count the tasks of every tenant that has any, without reading them."""
        found = cast(list[list[Any]], self._scripts.run("counts", "", [], []))
        return [
            TenantTasks(
                str(tenant),
                dict(zip(LANES, map(int, waiting), strict=True)),
                int(str(oldest)[:12], 16) if oldest else None,  # an id begins with the time that its job was made at
                int(running),
                int(float(started)) if started else None,
            )
            for tenant, oldest, running, started, *waiting in found
        ]

    def adopt(self) -> None:
        """Let tasks take their turn that processes of the last release made to wait."""
        while self._scripts.run("adopt", "", [self._keys.due], [ADOPTED_AT_ONCE]):
            pass

    def _write(self, script: str, attempt: Attempt, arguments: Sequence[Any]) -> bool:
        """Run a script of an attempt at a task, and return whether it wrote anything."""
        task = attempt.task
        named = [str(task), attempt.number, *arguments]
        return bool(self._scripts.run(script, task.job, [self._keys.task(task)], named))

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
            [self._keys.task(attempt.task)],
            [
                str(attempt.task),
                attempt.number,
                listed(status.predecessors),
                status,
                "" if progress is None else progress.model_dump_json(),
                "" if result is None else result.model_dump_json(),
                json.dumps([] if result is None else counts_of(result)),
                len(notes),
                *notes,
                *flat(fields),
            ],
        )
        return bool(done)
