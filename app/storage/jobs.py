"""The job store: records, tasks, leases and idempotency keys in Redis. This is the truth about every job.

Each write is one Lua script, so that it is whole or not at all, and a compare-and-set: against the record's status
(the transitions of `Status`) and, from a worker, against its attempt number. RQ only carries task ids; if it loses one,
`due` finds it again. When an answer gets lost the client asks again by itself, so creating a job, claiming it,
recording its progress and ending it are the same the second time. Each change of a job's status or progress is an event
in its log, added by the script that makes the change; `app.storage.events` reads it.

Keys, all below the prefix: `job:<id>` and `task:<id>` hashes; `events:<id>` and `progress:<id>` streams; `jobs` all job
ids by time; `due` tasks waiting for a worker by when they were last handed to RQ; `leases` running tasks by expiry;
`deadlines` active tasks that have one, by it; `gone:<id>` why a job that was there is not any more; `workers` live
workers by expiry; `idempotency:<digest>`.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

from redis import Redis
from redis.commands.core import Script

from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    Gone,
    JobError,
    Kind,
    Phase,
    Progress,
    Record,
    Stage,
    Status,
    TaskId,
    TaskState,
)
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult

Clock = Callable[[], int]
"""Milliseconds since the epoch."""


def _listed(statuses: Iterable[Status]) -> str:
    """Statuses as the scripts search them: ,a,b,"""
    return "," + ",".join(sorted(statuses)) + ","


FINAL = _listed(status for status in Status if status.is_final)
PROGRESS_KEPT = 1000  # a job's newest progress events: eight minutes at two a second, 150 kB
PROGRESS_KEPT_S = 3600  # after the job's end; its other events stay as long as its record
GONE_KEPT_S = 30 * 86_400  # why a job is gone; what is left of its files is known for nobody's as long

# Every script begins with this. KEYS: job, events, progress, deadlines, then its own. ARGV: now, then its own.
#
# An event is numbered by the record's revision and added where the record is changed, so it is as durable and as
# ordered as the write, and whoever has seen event n has seen the record up to revision n. Progress has a stream of its
# own, because it alone comes without end and may be cut.
PRELUDE = f"""
local job, events, progress_events, deadlines, now = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1]

local function add(stream, ...)
  redis.call('XADD', stream, redis.call('HINCRBY', job, 'revision', 1), 'at', now, ...)
end

local function log(code, message)
  add(events, 'event', 'log', 'code', code, 'attempt', redis.call('HGET', job, 'attempt'), 'message', message)
end

local function report(progress)
  if redis.call('HGET', job, 'progress') == progress then return end
  redis.call('HSET', job, 'progress', progress)
  add(progress_events, 'event', 'progress', 'progress', progress)
  redis.call('XTRIM', progress_events, 'MAXLEN', '~', {PROGRESS_KEPT})
end

local function start_the_time(task)
  local deadline_ms = redis.call('HGET', job, 'deadline_ms')
  if deadline_ms then redis.call('ZADD', deadlines, now + deadline_ms, task) end
end

local function is_overdue(task)
  local deadline = redis.call('ZSCORE', deadlines, task)
  return deadline and tonumber(deadline) <= tonumber(now)
end

local function enter(status)
  redis.call('HSET', job, 'status', status)
  if string.find('{FINAL}', ',' .. status .. ',', 1, true) then
    redis.call('HSET', job, 'finished_ms', now)
    redis.call('EXPIRE', progress_events, {PROGRESS_KEPT_S})
  end
  local error = redis.call('HGET', job, 'error') or ''
  add(events, 'event', 'status', 'status', status, 'attempt', redis.call('HGET', job, 'attempt'), 'error', error)
end
"""

# KEYS: jobs, task, due, idempotency. ARGV: id, task id, idempotency value or '', its seconds, status, fields…
CREATE = """
local jobs, task, due, idempotency = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
if redis.call('EXISTS', job) == 1 then return false end
if ARGV[4] ~= '' then
  local before = redis.call('GET', idempotency)
  if before then return before end
  redis.call('SET', idempotency, ARGV[4], 'EX', ARGV[5])
end
redis.call('HSET', job, unpack(ARGV, 7))
redis.call('ZADD', jobs, 0, ARGV[2])
redis.call('HSET', task, 'state', 'queued', 'attempt', 0, 'losses', 0)
redis.call('ZADD', due, 0, ARGV[3])
start_the_time(ARGV[3])
enter(ARGV[6])
return false
"""

# KEYS: task, due, leases. ARGV: task id, lease ms, worker, progress
CLAIM = """
local task, due, leases = KEYS[5], KEYS[6], KEYS[7]
local state = redis.call('HGET', task, 'state')
if state == 'running' and redis.call('HGET', task, 'worker') == ARGV[4] then
  redis.call('ZADD', leases, now + ARGV[3], ARGV[2])  -- the answer to its claim got lost
  return tonumber(redis.call('HGET', task, 'attempt'))
end
if state ~= 'queued' then return 0 end
if redis.call('HGET', job, 'status') ~= 'queued' or is_overdue(ARGV[2]) then return 0 end
local attempt = redis.call('HINCRBY', task, 'attempt', 1)
redis.call('HSET', task, 'state', 'running', 'worker', ARGV[4])
redis.call('ZREM', due, ARGV[2])
redis.call('ZADD', leases, now + ARGV[3], ARGV[2])
redis.call('HSET', job, 'attempt', attempt, 'started_ms', now)
enter('running')
log('attempt_started', 'attempt ' .. attempt .. ' starts on worker ' .. ARGV[4])
report(ARGV[5])
return attempt
"""

# KEYS: task, leases. ARGV: task id, attempt, lease ms, progress or ''
RENEW = """
local task, leases = KEYS[5], KEYS[6]
if redis.call('HGET', task, 'state') ~= 'running' then return false end
if redis.call('HGET', task, 'attempt') ~= ARGV[3] then return false end
redis.call('ZADD', leases, now + ARGV[4], ARGV[2])
if ARGV[5] ~= '' then report(ARGV[5]) end
return redis.call('HGET', job, 'status')
"""

# KEYS: task, leases. ARGV: task id, attempt, allowed statuses as ,a,b, then status, progress or '', count of notes,
#       notes…, fields…
FINISH = """
local task, leases = KEYS[5], KEYS[6]
if redis.call('HGET', task, 'attempt') ~= ARGV[3] then return 0 end
local state = redis.call('HGET', task, 'state')
local status = redis.call('HGET', job, 'status')
if state == 'done' and status == ARGV[5] then return 1 end
if state ~= 'running' then return 0 end
if not string.find(ARGV[4], ',' .. status .. ',', 1, true) then return 0 end
if ARGV[5] == 'succeeded' and is_overdue(ARGV[2]) then return 0 end
redis.call('HSET', task, 'state', 'done')
redis.call('ZREM', leases, ARGV[2])
redis.call('ZREM', deadlines, ARGV[2])
local fields = 8 + ARGV[7]
for note = 8, fields - 1 do log('note', ARGV[note]) end
if fields <= #ARGV then redis.call('HSET', job, unpack(ARGV, fields)) end
if ARGV[6] ~= '' then report(ARGV[6]) end
enter(ARGV[5])
return 1
"""

# KEYS: task, due. ARGV: task id
# Returns the job's status after it, or false when there is no such job.
CANCEL = """
local task, due = KEYS[5], KEYS[6]
local status = redis.call('HGET', job, 'status')
if status == 'queued' then
  redis.call('HSET', task, 'state', 'done')
  redis.call('ZREM', due, ARGV[2])
  redis.call('ZREM', deadlines, ARGV[2])
  enter('cancelled')
elseif status == 'running' then
  redis.call('ZREM', deadlines, ARGV[2])
  enter('cancelling')
end
return redis.call('HGET', job, 'status')
"""

# KEYS: task, due. ARGV: task id, allowed statuses as ,a,b, then progress when queued
RETRY = """
local task, due = KEYS[5], KEYS[6]
local status = redis.call('HGET', job, 'status')
if not status or not string.find(ARGV[3], ',' .. status .. ',', 1, true) then return 0 end
redis.call('HSET', task, 'state', 'queued', 'losses', 0)
redis.call('ZADD', due, 0, ARGV[2])
redis.call('HDEL', job, 'error', 'started_ms', 'finished_ms')
redis.call('PERSIST', progress_events)
start_the_time(ARGV[2])
enter('queued')
report(ARGV[4])
return 1
"""

# KEYS: task, jobs, gone. ARGV: id, final statuses as ,a,b, latest end, why, its seconds
# Returns: 0 there is no such job, 1 deleted, 2 it has not ended, or not as early.
DELETE = """
local task, jobs, gone = KEYS[5], KEYS[6], KEYS[7]
local status = redis.call('HGET', job, 'status')
if not status then return 0 end
if not string.find(ARGV[3], ',' .. status .. ',', 1, true) then return 2 end
if tonumber(redis.call('HGET', job, 'finished_ms')) > tonumber(ARGV[4]) then return 2 end
redis.call('SET', gone, ARGV[5], 'EX', ARGV[6])
redis.call('DEL', task, job, events, progress_events)
redis.call('ZREM', jobs, ARGV[2])
return 1
"""

# KEYS: task, leases, due. ARGV: task id, error
# A job that is being cancelled goes on to be.
TIME_OUT = """
local task, leases, due = KEYS[5], KEYS[6], KEYS[7]
if not is_overdue(ARGV[2]) then return 0 end
redis.call('ZREM', deadlines, ARGV[2])
local status = redis.call('HGET', job, 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
redis.call('HSET', task, 'state', 'done')
redis.call('ZREM', leases, ARGV[2])
redis.call('ZREM', due, ARGV[2])
redis.call('HSET', job, 'error', ARGV[3])
enter('failed')
return 1
"""

# KEYS: task, leases, due. ARGV: task id, attempt, 1 for a loss, most losses, 1 if only when expired, progress when
#       queued, error when lost too often
# Returns: 0 not ours to release, 1 queued again, 2 failed, 3 cancelled.
RELEASE = """
local task, leases, due = KEYS[5], KEYS[6], KEYS[7]
if redis.call('HGET', task, 'state') ~= 'running' then return 0 end
if redis.call('HGET', task, 'attempt') ~= ARGV[3] then return 0 end
if ARGV[6] == '1' then
  local expiry = redis.call('ZSCORE', leases, ARGV[2])
  if expiry and tonumber(expiry) > tonumber(now) then return 0 end
end
redis.call('ZREM', leases, ARGV[2])
local losses = redis.call('HINCRBY', task, 'losses', ARGV[4])
if ARGV[4] == '1' then
  local loss = 'loss ' .. losses .. ' of ' .. ARGV[5]
  log('attempt_lost', 'attempt ' .. ARGV[3] .. ' lost its worker or engine process, ' .. loss)
else
  log('attempt_handed_back', 'attempt ' .. ARGV[3] .. ' was handed back by a worker that stops')
end
if redis.call('HGET', job, 'status') == 'cancelling' then
  redis.call('HSET', task, 'state', 'done')
  enter('cancelled')
  return 3
end
if losses > tonumber(ARGV[5]) - 1 and ARGV[4] == '1' then
  redis.call('HSET', task, 'state', 'done')
  redis.call('ZREM', deadlines, ARGV[2])
  redis.call('HSET', job, 'error', ARGV[8])
  enter('failed')
  return 2
end
redis.call('HSET', task, 'state', 'queued')
redis.call('ZADD', due, 0, ARGV[2])
enter('queued')
report(ARGV[7])
return 1
"""


class Deleted(IntEnum):
    """The outcome of a deletion; the numbers are those of the script."""

    NO_SUCH_JOB = 0
    DONE = 1
    NOT_ENDED = 2


@dataclass(frozen=True)
class Created:
    """`existing` when the idempotency key was used before; `same_body` whether with the same body."""

    job_id: str
    existing: bool
    same_body: bool = True


class JobStore:
    """Stores jobs. It raises redis exceptions when Redis is away; everything else is a return value.

    Args:
        redis: a client with decode_responses.
        clock: Redis' own by default, so that the machines of a deployment need not agree on the time.
        retention_seconds: how long a job is kept after its end; for ever when None.
    """

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        lease_seconds: float,
        max_losses: int,
        clock: Clock | None = None,
        retention_seconds: float | None = None,
    ) -> None:
        self.redis = redis
        self._retention_ms = None if retention_seconds is None else int(retention_seconds * 1000)
        self._prefix = prefix
        self.lease_seconds = lease_seconds
        self._lease_ms = int(lease_seconds * 1000)
        self._max_losses = max_losses
        self.clock = clock or self._redis_clock
        self._create = redis.register_script(PRELUDE + CREATE)
        self._claim = redis.register_script(PRELUDE + CLAIM)
        self._renew = redis.register_script(PRELUDE + RENEW)
        self._finish = redis.register_script(PRELUDE + FINISH)
        self._release = redis.register_script(PRELUDE + RELEASE)
        self._cancel = redis.register_script(PRELUDE + CANCEL)
        self._retry = redis.register_script(PRELUDE + RETRY)
        self._delete = redis.register_script(PRELUDE + DELETE)
        self._time_out = redis.register_script(PRELUDE + TIME_OUT)

    # --- records

    def create(
        self,
        request: dict[str, Any],
        name: str,
        labels: dict[str, str],
        idempotency: tuple[str, str] | None = None,
        idempotency_seconds: int = 86_400,
        inputs: Mapping[str, str] | None = None,
        kind: Kind = Kind.MERGE,
        deadline_seconds: float | None = None,
    ) -> Created:
        """Create a queued job with its task.

        Args:
            idempotency: (key, digest of the body).
            inputs: state of each checkpoint by its reference, for the worker to compare.
            deadline_seconds: what the job may take from now on, or from a later retry, waiting included.
        """
        now = self.clock()
        job_id = f"{now:012x}{secrets.token_hex(8)}"  # sorts by time; the rest cannot be guessed
        task = TaskId(job=job_id, stage=Stage.MERGE)
        fields = {
            "kind": kind,
            "name": name,
            "attempt": 0,
            "created_ms": now,
            "request": json.dumps(request),
            "labels": json.dumps(labels),
            "inputs": json.dumps(inputs or {}),
            "progress": Progress().model_dump_json(),
        }
        if deadline_seconds is not None:
            fields["deadline_ms"] = int(deadline_seconds * 1000)
        key, digest = idempotency or ("", "")
        remembered = f"{job_id} {digest}" if key else ""
        before = self._call(
            self._create,
            job_id,
            [self._key("jobs"), self._task_key(task), self._key("due"), self._idempotency_key(key)],
            [job_id, str(task), remembered, idempotency_seconds, Status.QUEUED, *_flat(fields)],
        )
        return _earlier(str(before), digest) if before else Created(job_id, existing=False)

    def remembered(self, idempotency_key: str, digest: str) -> Created | None:
        """The job that the key made before, if there is one."""
        before = self.redis.get(self._idempotency_key(idempotency_key))
        return _earlier(str(before), digest) if before else None

    def get(self, job_id: str) -> Record | None:
        fields = cast(dict[str, str], self.redis.hgetall(self._key("job", job_id)))
        return _record(job_id, fields, self._retention_ms) if fields else None

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
        status = self._call(self._cancel, job_id, [self._task_key(task), self._key("due")], [str(task)])
        return Status(status) if status else None

    def retry(self, job_id: str) -> TaskId | None:
        """Queue a failed or cancelled job anew; its task, to be dispatched. None when it is neither."""
        task = TaskId(job=job_id, stage=Stage.MERGE)
        again = _listed(Status.QUEUED.predecessors - {Status.RUNNING})
        keys = [self._task_key(task), self._key("due")]
        done = self._call(self._retry, job_id, keys, [str(task), again, Progress().model_dump_json()])
        return task if done else None

    def delete(self, job_id: str, *, ended_by_ms: int | None = None) -> Deleted:
        """Forget a job that has ended (by `ended_by_ms`, if given). Its files then belong to no job."""
        task = TaskId(job=job_id, stage=Stage.MERGE)
        latest = 2**53 if ended_by_ms is None else ended_by_ms
        why = Gone.DELETED if ended_by_ms is None else Gone.EXPIRED
        keys = [self._task_key(task), self._key("jobs"), self._key("gone", job_id)]
        return Deleted(self._call(self._delete, job_id, keys, [job_id, FINAL, latest, why, GONE_KEPT_S]))

    def gone(self, job_id: str) -> Gone | None:
        """Why the job is gone; None when it exists, never existed, or was removed long ago."""
        why = self.redis.get(self._key("gone", job_id))
        return Gone(str(why)) if why else None

    def outlived(self) -> Iterator[Record]:
        """Ended jobs that were kept for their time, oldest first, except those whose models an active job reads."""
        if self._retention_ms is None:
            return
        ended_by = self.clock() - self._retention_ms
        before = f"({max(0, ended_by) + 1:012x}"  # an id begins with the time that its job was made at
        position, page, read = "-", 100, None
        while True:
            ids = cast(list[str], self.redis.zrangebylex(self._key("jobs"), position, before, start=0, num=page))
            for job_id in ids:
                record = self.get(job_id)
                if record is None or record.finished_ms is None or record.finished_ms > ended_by:
                    continue
                read = self._read_by_active_jobs() if read is None else read
                if job_id not in read:
                    yield record
            if len(ids) < page:
                return
            position = f"({ids[-1]}"

    def expire(self, record: Record) -> bool:
        """Forget an outlived job. False when it was retried meanwhile, or is gone already."""
        return self.delete(record.id, ended_by_ms=record.finished_ms) is Deleted.DONE

    def _read_by_active_jobs(self) -> set[str]:
        """Ids of the jobs whose models active jobs name."""
        tasks = [name for key in ("due", "leases") for name in self.redis.zrange(self._key(key), 0, -1)]
        active = [self.get(TaskId.parse(str(name)).job) for name in tasks]
        named = (reference for record in active if record is not None for reference in record.inputs)
        return {reference.removeprefix("job:").partition("/")[0] for reference in named if reference.startswith("job:")}

    # --- what a worker does with a task

    def claim(self, task: TaskId, worker: str) -> Attempt | None:
        """Start an attempt; None when the task is not waiting (done, running elsewhere, cancelled, deleted)."""
        number = self._call(
            self._claim,
            task.job,
            [self._task_key(task), self._key("due"), self._key("leases")],
            [str(task), self._lease_ms, worker, Progress(phase=Phase.LOADING).model_dump_json()],
        )
        return Attempt(task=task, number=int(number)) if number else None

    def renew(self, attempt: Attempt, progress: Progress | None = None) -> Status | None:
        """Extend the lease and perhaps record progress.

        The job's status; None when the attempt is no longer ours.
        """
        status = self._call(
            self._renew,
            attempt.task.job,
            [self._task_key(attempt.task), self._key("leases")],
            [
                str(attempt.task),
                attempt.number,
                self._lease_ms,
                "" if progress is None else progress.model_dump_json(),
            ],
        )
        return Status(status) if status else None

    def succeed(self, attempt: Attempt, result: MergeResult | ScoreResult, artifact: str) -> bool:
        """Final. False when the attempt is no longer ours; its artifact must go then."""
        return self._end(
            attempt,
            Status.SUCCEEDED,
            {"result": result.model_dump_json(), "artifact": artifact},
            Progress(phase=Phase.DONE, done=1, total=1, unit="jobs", fraction=1.0, eta_seconds=0.0),
            result.notes,
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
        outcome = self._call(
            self._release,
            attempt.task.job,
            [self._task_key(attempt.task), self._key("leases"), self._key("due")],
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

    def time_out(self) -> int:
        """End the jobs whose deadline has passed, waiting or running; how many there were."""
        names = cast(list[str], self.redis.zrangebyscore(self._key("deadlines"), "-inf", self.clock()))
        ended = 0
        for task in map(TaskId.parse, names):
            allowed = self.redis.hget(self._key("job", task.job), "deadline_ms")
            error = JobError(
                code=ErrorCode.TIMEOUT,
                message=f"the job did not end within its deadline_seconds, {int(allowed or 0) / 1000:g}; a retry has "
                "as long again",
                retryable=True,
            )
            keys = [self._task_key(task), self._key("leases"), self._key("due")]
            ended += self._call(self._time_out, task.job, keys, [str(task), error.model_dump_json()])
        return ended

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

    def _end(
        self,
        attempt: Attempt,
        status: Status,
        fields: dict[str, str],
        progress: Progress | None = None,
        notes: Sequence[str] = (),
    ) -> bool:
        done = self._call(
            self._finish,
            attempt.task.job,
            [self._task_key(attempt.task), self._key("leases")],
            [
                str(attempt.task),
                attempt.number,
                _listed(status.predecessors),
                status,
                "" if progress is None else progress.model_dump_json(),
                len(notes),
                *notes,
                *_flat(fields),
            ],
        )
        return bool(done)

    def _call(self, script: Script, job_id: str, keys: list[str], args: list[Any]) -> Any:
        """Run a script on a job, with what every script begins with."""
        shared = [*job_keys(self._prefix, job_id), self._key("deadlines")]
        return script(keys=[*shared, *keys], args=[self.clock(), *args])

    def _redis_clock(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    def _idempotency_key(self, key: str) -> str:
        return self._key("idempotency", hashlib.sha256(key.encode()).hexdigest())  # a key may hold any text

    def _task_key(self, task: TaskId) -> str:
        return self._key("task", str(task))


def job_keys(prefix: str, job_id: str) -> list[str]:
    """Record, events, progress events."""
    return [f"{prefix}:{kind}:{job_id}" for kind in ("job", "events", "progress")]


def _earlier(remembered: str, digest: str) -> Created:
    job_id, _, earlier_digest = remembered.partition(" ")
    return Created(job_id, existing=True, same_body=earlier_digest == digest)


def _flat(fields: dict[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


def _record(job_id: str, fields: dict[str, str], retention_ms: int | None) -> Record:
    def number(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    kind = Kind(fields.get("kind", Kind.MERGE))  # records that were stored before there were kinds have none
    result = MergeResult if kind is Kind.MERGE else ScoreResult
    finished = number("finished_ms")
    return Record(
        id=job_id,
        kind=kind,
        name=fields["name"],
        status=Status(fields["status"]),
        attempt=int(fields["attempt"]),
        revision=int(fields["revision"]),
        created_ms=int(fields["created_ms"]),
        started_ms=number("started_ms"),
        finished_ms=finished,
        expires_ms=None if finished is None or retention_ms is None else finished + retention_ms,
        progress=Progress.model_validate_json(fields["progress"]),
        error=JobError.model_validate_json(fields["error"]) if "error" in fields else None,
        request=json.loads(fields["request"]),
        result=result.model_validate_json(fields["result"]) if "result" in fields else None,
        labels=json.loads(fields["labels"]),
        inputs=json.loads(fields["inputs"]),
        artifact=fields.get("artifact"),
    )
