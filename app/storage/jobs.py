"""The job store: records, tasks, leases and idempotency keys in Redis. This is the truth about every job.

Each write is one Lua script, so that it is whole or not at all, and a compare-and-set: against the record's status
(the transitions of `Status`) and, from a worker, against its attempt number. RQ only carries task ids; if it loses one,
`due` finds it again. When an answer gets lost the client asks again by itself, so creating a job and ending it are the
same the second time.

Keys, all below the prefix: `job:<id>` and `task:<id>` hashes; `jobs` all job ids by time; `due` tasks waiting for a
worker by when they were last handed to RQ; `leases` running tasks by expiry; `workers` live workers by expiry;
`idempotency:<digest>`.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis

from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    JobError,
    Phase,
    Progress,
    Record,
    Stage,
    Status,
    TaskId,
    TaskState,
)
from worker.engine.catalog.report import MergeResult

Clock = Callable[[], int]
"""Milliseconds since the epoch."""

# KEYS: job, jobs, task, due, idempotency. ARGV: id, task id, now, idempotency value or '', its seconds, fields…
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
if ARGV[4] ~= '' then
  local before = redis.call('GET', KEYS[5])
  if before then return before end
  redis.call('SET', KEYS[5], ARGV[4], 'EX', ARGV[5])
end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('HSET', KEYS[3], 'state', 'queued', 'attempt', 0, 'losses', 0)
redis.call('ZADD', KEYS[4], 0, ARGV[2])
return false
"""

# KEYS: task, due, leases, job. ARGV: task id, now, lease ms, worker, progress
CLAIM = """
if redis.call('HGET', KEYS[1], 'state') ~= 'queued' then return 0 end
if redis.call('HGET', KEYS[4], 'status') ~= 'queued' then return 0 end
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[4])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2] + ARGV[3], ARGV[1])
redis.call('HSET', KEYS[4], 'status', 'running', 'attempt', attempt, 'started_ms', ARGV[2], 'progress', ARGV[5])
redis.call('HINCRBY', KEYS[4], 'revision', 1)
return attempt
"""

# KEYS: task, leases, job. ARGV: task id, attempt, now, lease ms, progress or ''
RENEW = """
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return false end
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return false end
redis.call('ZADD', KEYS[2], ARGV[3] + ARGV[4], ARGV[1])
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[3], 'progress', ARGV[5])
  redis.call('HINCRBY', KEYS[3], 'revision', 1)
end
return redis.call('HGET', KEYS[3], 'status')
"""

# KEYS: task, leases, job. ARGV: task id, attempt, allowed statuses as ,a,b, then status, its value, further fields…
FINISH = """
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 0 end
local state = redis.call('HGET', KEYS[1], 'state')
local status = redis.call('HGET', KEYS[3], 'status')
if state == 'done' and status == ARGV[5] then return 1 end
if state ~= 'running' then return 0 end
if not string.find(ARGV[3], ',' .. status .. ',', 1, true) then return 0 end
redis.call('HSET', KEYS[1], 'state', 'done')
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
redis.call('HINCRBY', KEYS[3], 'revision', 1)
return 1
"""

# KEYS: task, due, job. ARGV: task id, now
# Returns the job's status after it, or false when there is no such job.
CANCEL = """
local status = redis.call('HGET', KEYS[3], 'status')
if status == 'queued' then
  redis.call('HSET', KEYS[1], 'state', 'done')
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('HSET', KEYS[3], 'status', 'cancelled', 'finished_ms', ARGV[2])
elseif status == 'running' then
  redis.call('HSET', KEYS[3], 'status', 'cancelling')
else
  return status
end
redis.call('HINCRBY', KEYS[3], 'revision', 1)
return redis.call('HGET', KEYS[3], 'status')
"""

# KEYS: task, due, job. ARGV: task id, allowed statuses as ,a,b, then progress when queued
RETRY = """
local status = redis.call('HGET', KEYS[3], 'status')
if not status or not string.find(ARGV[2], ',' .. status .. ',', 1, true) then return 0 end
redis.call('HSET', KEYS[1], 'state', 'queued', 'losses', 0)
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('HDEL', KEYS[3], 'error', 'started_ms', 'finished_ms')
redis.call('HSET', KEYS[3], 'status', 'queued', 'progress', ARGV[3])
redis.call('HINCRBY', KEYS[3], 'revision', 1)
return 1
"""

# KEYS: task, jobs, job. ARGV: id, final statuses as ,a,b,
DELETE = """
local status = redis.call('HGET', KEYS[3], 'status')
if not status or not string.find(ARGV[2], ',' .. status .. ',', 1, true) then return 0 end
redis.call('DEL', KEYS[1], KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""

# KEYS: task, leases, due, job. ARGV: task id, attempt, now, 1 for a loss, most losses, 1 if only when expired,
#       progress when queued, error when lost too often
# Returns: 0 not ours to release, 1 queued again, 2 failed, 3 cancelled.
RELEASE = """
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 0 end
if ARGV[6] == '1' then
  local expiry = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if expiry and tonumber(expiry) > tonumber(ARGV[3]) then return 0 end
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[4], 'revision', 1)
if redis.call('HGET', KEYS[4], 'status') == 'cancelling' then
  redis.call('HSET', KEYS[1], 'state', 'done')
  redis.call('HSET', KEYS[4], 'status', 'cancelled', 'finished_ms', ARGV[3])
  return 3
end
local losses = redis.call('HINCRBY', KEYS[1], 'losses', ARGV[4])
if losses > tonumber(ARGV[5]) - 1 and ARGV[4] == '1' then
  redis.call('HSET', KEYS[1], 'state', 'done')
  redis.call('HSET', KEYS[4], 'status', 'failed', 'error', ARGV[8], 'finished_ms', ARGV[3])
  return 2
end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('ZADD', KEYS[3], 0, ARGV[1])
redis.call('HSET', KEYS[4], 'status', 'queued', 'progress', ARGV[7])
return 1
"""


@dataclass(frozen=True)
class Created:
    """`existing` when the idempotency key was used before; `same_body` whether with the same body."""

    job_id: str
    existing: bool
    same_body: bool = True


class JobStore:
    """Raises redis exceptions when Redis is away; everything else is a return value.

    Args:
        redis: a client with decode_responses.
        clock: Redis' own by default, so that the machines of a deployment need not agree on the time.
    """

    def __init__(self, redis: Redis, prefix: str, lease_seconds: float, max_losses: int, clock: Clock | None = None):
        self.redis = redis
        self._prefix = prefix
        self._lease_ms = int(lease_seconds * 1000)
        self._max_losses = max_losses
        self.clock = clock or self._redis_clock
        self._create = redis.register_script(CREATE)
        self._claim = redis.register_script(CLAIM)
        self._renew = redis.register_script(RENEW)
        self._finish = redis.register_script(FINISH)
        self._release = redis.register_script(RELEASE)
        self._cancel = redis.register_script(CANCEL)
        self._retry = redis.register_script(RETRY)
        self._delete = redis.register_script(DELETE)

    # --- records

    def create(
        self,
        request: dict[str, Any],
        name: str,
        labels: dict[str, str],
        idempotency: tuple[str, str] | None = None,
        idempotency_seconds: int = 86_400,
    ) -> Created:
        """A queued job with its task. `idempotency` is (key, digest of the body)."""
        now = self.clock()
        job_id = f"{now:012x}{secrets.token_hex(8)}"  # sorts by time; the rest cannot be guessed
        task = TaskId(job=job_id, stage=Stage.MERGE)
        fields = {
            "status": Status.QUEUED,
            "name": name,
            "attempt": 0,
            "revision": 1,
            "created_ms": now,
            "request": json.dumps(request),
            "labels": json.dumps(labels),
            "progress": Progress().model_dump_json(),
        }
        key, digest = idempotency or ("", "")
        remembered = f"{job_id} {digest}" if key else ""
        before = self._create(
            keys=[
                self._key("job", job_id),
                self._key("jobs"),
                self._task_key(task),
                self._key("due"),
                self._idempotency_key(key),
            ],
            args=[job_id, str(task), now, remembered, idempotency_seconds, *_flat(fields)],
        )
        return _earlier(str(before), digest) if before else Created(job_id, existing=False)

    def remembered(self, idempotency_key: str, digest: str) -> Created | None:
        """What the key made before, if it did."""
        before = self.redis.get(self._idempotency_key(idempotency_key))
        return _earlier(str(before), digest) if before else None

    def get(self, job_id: str) -> Record | None:
        fields = cast(dict[str, str], self.redis.hgetall(self._key("job", job_id)))
        return _record(job_id, fields) if fields else None

    def newest(self, after: str | None = None) -> Iterator[Record]:
        """Records, newest first, older than the job `after`; read in pages as they are consumed."""
        page = 100
        end = f"({after}" if after else "+"
        while True:
            ids = cast(list[str], self.redis.zrevrangebylex(self._key("jobs"), end, "-", start=0, num=page))
            for job_id in ids:
                record = self.get(job_id)
                if record is not None:
                    yield record
            if len(ids) < page:
                return
            end = f"({ids[-1]}"

    def cancel(self, job_id: str) -> Status | None:
        """Cancel what waits, ask what runs to stop; the job's status after it, None when there is no such job."""
        task = TaskId(job=job_id, stage=Stage.MERGE)
        status = self._cancel(
            keys=[self._task_key(task), self._key("due"), self._key("job", job_id)], args=[str(task), self.clock()]
        )
        return Status(status) if status else None

    def retry(self, job_id: str) -> TaskId | None:
        """Queue a failed or cancelled job anew; its task, to be dispatched. None when it is neither."""
        task = TaskId(job=job_id, stage=Stage.MERGE)
        again = _listed(Status.QUEUED.predecessors - {Status.RUNNING})
        done = self._retry(
            keys=[self._task_key(task), self._key("due"), self._key("job", job_id)],
            args=[str(task), again, Progress().model_dump_json()],
        )
        return task if done else None

    def delete(self, job_id: str) -> bool:
        """Forget a job that has ended. False while it is active."""
        task = TaskId(job=job_id, stage=Stage.MERGE)
        final = _listed(status for status in Status if status.is_final)
        keys = [self._task_key(task), self._key("jobs"), self._key("job", job_id)]
        return bool(self._delete(keys=keys, args=[job_id, final]))

    # --- what a worker does with a task

    def claim(self, task: TaskId, worker: str) -> Attempt | None:
        """Start an attempt; None when the task is not waiting (done, running elsewhere, cancelled, deleted)."""
        number = self._claim(
            keys=[self._task_key(task), self._key("due"), self._key("leases"), self._key("job", task.job)],
            args=[str(task), self.clock(), self._lease_ms, worker, Progress(phase=Phase.LOADING).model_dump_json()],
        )
        return Attempt(task=task, number=int(number)) if number else None

    def renew(self, attempt: Attempt, progress: Progress | None = None) -> Status | None:
        """Extend the lease and perhaps record progress.

        The job's status; None when the attempt is no longer ours.
        """
        status = self._renew(
            keys=[self._task_key(attempt.task), self._key("leases"), self._key("job", attempt.task.job)],
            args=[
                str(attempt.task),
                attempt.number,
                self.clock(),
                self._lease_ms,
                "" if progress is None else progress.model_dump_json(),
            ],
        )
        return Status(status) if status else None

    def succeed(self, attempt: Attempt, result: MergeResult, artifact: str) -> bool:
        """Final. False when the attempt is no longer ours; its artifact must go then."""
        progress = Progress(phase=Phase.DONE, done=1, total=1, unit="jobs", fraction=1.0, eta_seconds=0.0)
        return self._end(
            attempt,
            Status.SUCCEEDED,
            {"result": result.model_dump_json(), "artifact": artifact, "progress": progress.model_dump_json()},
        )

    def fail(self, attempt: Attempt, error: JobError) -> bool:
        """Final. False when the attempt is no longer ours."""
        return self._end(attempt, Status.FAILED, {"error": error.model_dump_json()})

    def acknowledge_cancel(self, attempt: Attempt) -> bool:
        """Final. False when nobody asked for it, or when the attempt is no longer ours."""
        return self._end(attempt, Status.CANCELLED, {})

    def release(self, attempt: Attempt, *, lost: bool, only_expired: bool = False) -> bool:
        """Put the task back in the queue; a task that is `lost` too often fails its job instead.

        False when there was nothing to release: the attempt ended, or (`only_expired`) its lease was renewed.
        """
        error = JobError(
            code=ErrorCode.WORKER_LOST,
            message=f"the job lost its worker {self._max_losses} times; the last attempt was {attempt.number}",
            retryable=True,
        )
        outcome = self._release(
            keys=[
                self._task_key(attempt.task),
                self._key("leases"),
                self._key("due"),
                self._key("job", attempt.task.job),
            ],
            args=[
                str(attempt.task),
                attempt.number,
                self.clock(),
                int(lost),
                self._max_losses,
                int(only_expired),
                Progress().model_dump_json(),
                error.model_dump_json(),
            ],
        )
        return bool(outcome)

    # --- what keeps the queue and the records together

    def expired(self) -> list[Attempt]:
        """Running attempts whose lease ran out."""
        names = cast(list[str], self.redis.zrangebyscore(self._key("leases"), "-inf", self.clock()))
        attempts = []
        for name in names:
            task = TaskId.parse(name)
            number = self.redis.hget(self._task_key(task), "attempt")
            if number is not None:
                attempts.append(Attempt(task=task, number=int(number)))
        return attempts

    def due(self, dispatched_before_ms: int) -> list[TaskId]:
        """Waiting tasks that were not handed to RQ since then."""
        names = cast(list[str], self.redis.zrangebyscore(self._key("due"), "-inf", dispatched_before_ms))
        return [TaskId.parse(name) for name in names]

    def dispatched(self, task: TaskId, message: str) -> None:
        """Note that RQ has the task, in its job `message`."""
        self.redis.zadd(self._key("due"), {str(task): self.clock()}, xx=True)
        self.redis.hset(self._task_key(task), "message", message)

    def message(self, task: TaskId) -> str | None:
        """The RQ job that carried the task last."""
        return cast(str | None, self.redis.hget(self._task_key(task), "message"))

    def attempt_is_current(self, task: TaskId, number: int) -> bool | None:
        """Whether this attempt is running; None when nothing is known of the job."""
        state, attempt = cast(list[str | None], self.redis.hmget(self._task_key(task), "state", "attempt"))
        if state is None or attempt is None:
            return None
        return state == TaskState.RUNNING and int(attempt) == number

    # --- workers

    def beat(self, worker: str, seconds: float) -> None:
        """This worker lives, for so long."""
        now = self.clock()
        self.redis.zremrangebyscore(self._key("workers"), "-inf", now)
        self.redis.zadd(self._key("workers"), {worker: now + int(seconds * 1000)})

    def sign_off(self, worker: str) -> None:
        self.redis.zrem(self._key("workers"), worker)

    def live_workers(self) -> int:
        return int(self.redis.zcount(self._key("workers"), self.clock(), "+inf"))

    def live_worker_names(self) -> list[str]:
        return cast(list[str], self.redis.zrangebyscore(self._key("workers"), self.clock(), "+inf"))

    # ---

    def _end(self, attempt: Attempt, status: Status, fields: dict[str, Any]) -> bool:
        done = self._finish(
            keys=[self._task_key(attempt.task), self._key("leases"), self._key("job", attempt.task.job)],
            args=[
                str(attempt.task),
                attempt.number,
                _listed(status.predecessors),
                *_flat({"status": status, "finished_ms": self.clock(), **fields}),
            ],
        )
        return bool(done)

    def _redis_clock(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _idempotency_key(self, key: str) -> str:
        return self._key("idempotency", hashlib.sha256(key.encode()).hexdigest())  # a key may hold any text

    def _task_key(self, task: TaskId) -> str:
        return self._key("task", str(task))


def _listed(statuses: Iterable[Status]) -> str:
    """As the scripts search them: ,a,b,"""
    return "," + ",".join(sorted(statuses)) + ","


def _earlier(remembered: str, digest: str) -> Created:
    job_id, _, earlier_digest = remembered.partition(" ")
    return Created(job_id, existing=True, same_body=earlier_digest == digest)


def _flat(fields: dict[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _record(job_id: str, fields: dict[str, str]) -> Record:
    def number(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    return Record(
        id=job_id,
        name=fields["name"],
        status=Status(fields["status"]),
        attempt=int(fields["attempt"]),
        revision=int(fields["revision"]),
        created_ms=int(fields["created_ms"]),
        started_ms=number("started_ms"),
        finished_ms=number("finished_ms"),
        progress=Progress.model_validate_json(fields["progress"]),
        error=JobError.model_validate_json(fields["error"]) if "error" in fields else None,
        request=json.loads(fields["request"]),
        result=MergeResult.model_validate_json(fields["result"]) if "result" in fields else None,
        labels=json.loads(fields["labels"]),
        artifact=fields.get("artifact"),
    )
