"""Records of jobs, which say what became of each. They are the truth; RQ only carries task ids."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, cast

from redis import Redis

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.devices import LANES, Device
from app.contracts.jobs import (
    ErrorCode,
    Gone,
    JobError,
    JobKind,
    Outcome,
    Progress,
    Record,
    RecordSummary,
    Stage,
    Status,
    TaskId,
)
from app.contracts.limits import QueueFull, TenantLimits
from app.contracts.webhooks import JobWebhook
from app.storage.active import ActiveJobs
from app.storage.keys import Keys
from app.storage.scripts import SUMMARY_FIELDS, JobScripts, flat, listed, source
from app.storage.usage import as_arguments, refusal
from worker.engine.catalog.contracts.report import MergeResult, MergeSummary, ScoreResult

GONE_KEPT_S = 30 * 86_400  # time for which it is known why a job is gone, and that its files belong to nobody
PAGE = 60  # records read at once; lists of the API have 20 entries unless asked otherwise
"""References to uploads and to models of jobs, in a request's JSON."""


class Deleted(IntEnum):
    """The outcome of a deletion; the numbers are those of the script."""

    NO_SUCH_JOB = 0
    DONE = 1
    NOT_ENDED = 2


@dataclass(frozen=True)
class NewJob:
    """A job to be made of an accepted request."""

    request: Mapping[str, Any]
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """State of each checkpoint by its reference, for the worker to compare."""
    kind: JobKind = JobKind.MERGE
    deadline_seconds: float | None = None
    """Time that the job may take from now on, or from a later retry, waiting included."""
    tenant: str = DEFAULT_TENANT
    priority: int = 0
    webhook: JobWebhook | None = None
    bytes_to_write: int = 0
    """Bytes of the artifact that it is going to write, as far as its plan says."""
    request_id: str | None = None
    """Id of the request that makes it, for logs."""
    traceparent: str | None = None
    """Name of that request's span, for traces; see `app.observability.traces`."""
    device: Device | None = None
    """Device of the workers that may do the job; None: any."""

    @property
    def method(self) -> str | None:
        """Name of the method that the request asks for."""
        name: str | None = self.request.get("method", {}).get("name")
        return name


@dataclass(frozen=True)
class Idempotency:
    """A key by which a repeated request is known, and makes no second job."""

    key: str
    digest: str
    """Digest of the request's body."""
    seconds: int | None
    """Time for which the key is remembered; None: for as long as the job is there, as the caller's own name of it."""


@dataclass(frozen=True)
class Created:
    """A job that a request made. `existing`: its idempotency key was used before; `same_body`: with the same body."""

    job_id: str
    existing: bool
    same_body: bool = True


@dataclass(frozen=True)
class Outlived:
    """An ended job whose time to be kept is over."""

    id: str
    finished_ms: int
    artifact: str | None


class Records:
    """Stores records. It raises redis exceptions when Redis is away, and reports everything else by return values.

    Args:
        redis: a client with decode_responses.
        retention_seconds: time for which a job is kept after its end; for ever when None.
        limits: numbers of jobs that wait and of bytes, by tenant.
    """

    def __init__(
        self, redis: Redis, keys: Keys, scripts: JobScripts, retention_seconds: float | None, limits: TenantLimits
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts
        self._retention_ms = None if retention_seconds is None else int(retention_seconds * 1000)
        self._limits = limits
        self._active = ActiveJobs(redis, keys)
        self._summaries = redis.register_script(source("summaries"))

    def create(
        self, job: NewJob, idempotency: Idempotency | None = None, room: int | None = None, uploaded: int = 0
    ) -> Created:
        """Create a queued job with its task, unless the idempotency key made one before.

        Args:
            room: bytes that the disk has left for this and all jobs that wait and run; None: enough.
            uploaded: bytes of the tenant's uploads.

        Raises:
            QueueFull, StorageFull: the tenant has as much as it may have.
            NoRoom: the disk has too little left.
        """
        now = self._scripts.clock()
        job_id = f"{now:012x}{secrets.token_hex(8)}"  # sorts by time; the rest cannot be guessed
        task = _task(job_id)
        fields = {
            "tenant": job.tenant,
            "kind": job.kind,
            "name": job.name,
            **({"method": job.method} if job.method else {}),
            "priority": job.priority,
            "bytes_to_write": job.bytes_to_write,
            "attempt": 0,
            "created_ms": now,
            "request": json.dumps(job.request),
            "labels": json.dumps(dict(job.labels)),
            "inputs": json.dumps(dict(job.inputs)),
            "progress": Progress().model_dump_json(),
        }
        if job.deadline_seconds is not None:
            fields["deadline_ms"] = int(job.deadline_seconds * 1000)
        if job.webhook is not None:
            fields["webhook"] = job.webhook.model_dump_json()
        if job.request_id is not None:
            fields["request_id"] = job.request_id
        if job.traceparent is not None:
            fields["traceparent"] = job.traceparent
        if job.device is not None:
            fields["device"] = job.device
        once = idempotency or Idempotency("", "", 0)
        remembered = f"{job_id} {once.digest}" if once.key else ""
        remembering = self._remembering(job.tenant, once)
        if once.seconds is None:
            fields |= {"key": once.key, "named": remembering}
        own = self._limits.of(job.tenant)
        before = self._scripts.run(
            "create",
            job_id,
            [
                self._keys.jobs,
                self._keys.jobs_of(job.tenant),
                self._keys.task(task),
                remembering,
            ],
            [
                job_id,
                str(task),
                remembered,
                once.seconds or 0,
                job.tenant,
                job.bytes_to_write,
                *as_arguments(own.queued_jobs, own.stored_bytes, uploaded, room),
                *flat(fields),
            ],
        )
        if isinstance(before, list):
            raise refusal(before, self._limits, job.tenant, job.bytes_to_write, room)
        return _earlier(str(before), once.digest) if before else Created(job_id, existing=False)

    def remembered(self, tenant: str, once: Idempotency) -> Created | None:
        """Return the job that a tenant's key made before, if there is one."""
        before = self._redis.get(self._remembering(tenant, once))
        if before:
            self._scripts.check_replicas()  # whoever asks again may have heard that they do not have the job
        return _earlier(str(before), once.digest) if before else None

    def require_place(self, tenant: str) -> None:
        """Raise QueueFull where no further job of the tenant may wait now; `create` decides it."""
        most = self._limits.of(tenant).queued_jobs
        if most is not None and (waiting := self._waiting(tenant)) >= most:
            raise QueueFull(most, waiting)

    def _waiting(self, tenant: str) -> int:
        """Count a tenant's waiting jobs; shards of one that runs are none."""
        shards = cast(str | None, self._redis.hget(self._keys.shards, tenant))
        waiting = sum(int(self._redis.zcard(self._keys.waiting(tenant, lane))) for lane in LANES)
        return waiting - int(shards or 0)

    def _remembering(self, tenant: str, once: Idempotency) -> str:
        """Return the name under which Redis remembers the job that a key made."""
        of = self._keys.named if once.seconds is None else self._keys.idempotency
        return of(tenant, once.key)

    def get(self, job_id: str) -> Record | None:
        """Return the whole record; None where there is no such job."""
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.record(job_id)))
        if not fields:
            return None
        result: MergeResult | ScoreResult | None = None
        if fields["status"] == Status.SUCCEEDED:
            stored = fields.get("result") or cast(str | None, self._redis.get(self._keys.result(job_id)))
            if stored is None:  # the job was deleted between the two reads
                return None
            result = (MergeResult if _kind(fields) is JobKind.MERGE else ScoreResult).model_validate_json(stored)
        return Record(
            **self._core(job_id, fields),
            revision=int(fields["revision"]),
            request=json.loads(fields["request"]),
            result=result,
            inputs=json.loads(fields["inputs"]),
            artifact=fields.get("artifact"),
            request_id=fields.get("request_id"),
            traceparent=fields.get("traceparent"),
        )

    def outcome(self, job_id: str, tenant: str | None = None) -> Outcome | Gone | None:
        """Return a job's status and artifact, or why it is gone; None where no job with this id is known.

        Args:
            tenant: jobs of others count as unknown; None for any tenant's.
        """
        names = ["status", "artifact", "tenant"]
        status, artifact, owner = cast(list[str | None], self._redis.hmget(self._keys.record(job_id), names))
        if status is None:
            return self.gone(job_id, tenant)
        is_known = tenant in (None, owner or DEFAULT_TENANT)
        return Outcome(status=Status(status), artifact=artifact) if is_known else None

    def newest(
        self,
        after: str | None = None,
        status: Status | None = None,
        labels: Sequence[tuple[str, str]] = (),
        tenant: str = DEFAULT_TENANT,
    ) -> Iterator[RecordSummary]:
        """Yield a tenant's jobs in short, newest first, older than the job `after`.

        They are read in pages as they are consumed.

        Args:
            status, labels: restrict the list to jobs in this state, and with all of these labels.
        """
        begin = f"({after}" if after else "+"
        while True:
            arguments: list[str | int] = [begin, PAGE, self._keys.record(""), *SUMMARY_FIELDS]
            found = cast(list[Any], self._summaries(keys=[self._keys.jobs_of(tenant)], args=arguments))
            ids, rows = cast(list[str], found[::2]), cast(list[list[str | None]], found[1::2])
            for job_id, row in zip(ids, rows, strict=True):
                fields = {name: value for name, value in zip(SUMMARY_FIELDS, row, strict=True) if value is not None}
                if "status" not in fields or (status is not None and fields["status"] != status):
                    continue
                if labels and not set(labels) <= json.loads(fields["labels"]).items():
                    continue
                yield self.summary(job_id, fields)
            if len(ids) < PAGE:
                return
            begin = f"({ids[-1]}"

    def summary(self, job_id: str, fields: Mapping[str, str]) -> RecordSummary:
        """Return a job in short, from those of its `SUMMARY_FIELDS` that there are."""
        return RecordSummary(**self._core(job_id, fields), result=_summary(fields))

    def cancel(self, job_id: str) -> Status | None:
        """Cancel a waiting job, or ask a running one to stop. Returns its new status; None where there is none."""
        task = _task(job_id)
        status = self._scripts.run("cancel", job_id, [self._keys.task(task)], [str(task)])
        return Status(status) if status else None

    def retry(self, job_id: str, room: int | None = None, uploaded: int = 0) -> bool:
        """Queue a failed or cancelled job anew. Returns False when it is neither. Raises as `create`."""
        task = _task(job_id)
        tenant, wanted = self._size(job_id)
        own, again = self._limits.of(tenant), listed(Status.QUEUED.predecessors - {Status.RUNNING})
        limits = as_arguments(own.queued_jobs, own.stored_bytes, uploaded, room)
        arguments = [str(task), again, Progress().model_dump_json(), tenant, *limits]
        done = self._scripts.run("retry", job_id, [self._keys.task(task)], arguments)
        if isinstance(done, list):
            raise refusal(done, self._limits, tenant, wanted, room)
        return bool(done)

    def bytes_to_write(self, job_id: str) -> int:
        """Return the number of bytes that an attempt of the job is going to write; 0 where there is no such job."""
        return self._size(job_id)[1]

    def _size(self, job_id: str) -> tuple[str, int]:
        """Return the job's tenant, and the bytes that it is going to write."""
        names = ["tenant", "bytes_to_write"]
        tenant, count = cast(list[str | None], self._redis.hmget(self._keys.record(job_id), names))
        return tenant or DEFAULT_TENANT, int(count or 0)

    def delete(self, job_id: str, *, ended_by_ms: int | None = None) -> Deleted:
        """Forget a job that has ended (by `ended_by_ms`, if given). Its files then belong to no job."""
        latest = 2**53 if ended_by_ms is None else ended_by_ms
        why = Gone.DELETED if ended_by_ms is None else Gone.EXPIRED
        keys = [self._keys.task(_task(job_id)), self._keys.jobs, self._keys.gone(job_id)]
        arguments = [job_id, latest, why, GONE_KEPT_S, DEFAULT_TENANT]
        return Deleted(self._scripts.run("delete", job_id, keys, arguments))

    def gone(self, job_id: str, tenant: str | None = None) -> Gone | None:
        """Return why the job is gone; None when it exists, never existed, or was removed long ago.

        Args:
            tenant: jobs of others count as if they had never existed; None for any tenant's.
        """
        why, _, owner = str(self._redis.get(self._keys.gone(job_id)) or "").partition(" ")
        return Gone(why) if why and tenant in (None, owner or DEFAULT_TENANT) else None

    def outlived(self) -> Iterator[Outlived]:
        """Yield ended jobs that were kept for their time, oldest first, unless an active job reads their models."""
        if self._retention_ms is None:
            return
        ended_by = self._scripts.clock() - self._retention_ms
        before = f"({max(0, ended_by) + 1:012x}"  # an id begins with the time that its job was made at
        position, read = "-", None
        while True:
            ids = cast(list[str], self._redis.zrangebylex(self._keys.jobs, position, before, start=0, num=PAGE))
            for job_id in ids:
                finished, artifact = cast(
                    list[str | None], self._redis.hmget(self._keys.record(job_id), ["finished_ms", "artifact"])
                )
                if finished is None or int(finished) > ended_by:
                    continue
                read = self._active.jobs_read() if read is None else read
                if job_id not in read:
                    yield Outlived(job_id, int(finished), artifact)
            if len(ids) < PAGE:
                return
            position = f"({ids[-1]}"

    def expire(self, job: Outlived | Record) -> bool:
        """Forget an outlived job. Returns False when it was retried meanwhile, or is gone already."""
        return self.delete(job.id, ended_by_ms=job.finished_ms) is Deleted.DONE

    def time_out(self) -> int:
        """End the jobs whose deadline has passed, waiting or running, and return how many there were."""
        names = cast(list[str], self._redis.zrangebyscore(self._keys.deadlines, "-inf", self._scripts.clock()))
        ended = 0
        for task in map(TaskId.parse, names):
            allowed = self._redis.hget(self._keys.record(task.job), "deadline_ms")
            error = JobError(
                code=ErrorCode.TIMEOUT,
                message=f"the job did not end within its deadline_seconds, {int(allowed or 0) / 1000:g}; a retry has "
                "as long again",
                retryable=True,
            )
            arguments = [str(task), error.model_dump_json()]
            ended += self._scripts.run("time_out", task.job, [self._keys.task(task)], arguments)
        return ended

    def _core(self, job_id: str, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields of `RecordCore`."""

        def number(name: str) -> int | None:
            return int(fields[name]) if name in fields else None

        finished, retention = number("finished_ms"), self._retention_ms
        return {
            "id": job_id,
            "tenant": fields.get("tenant", DEFAULT_TENANT),
            "kind": _kind(fields),
            "name": fields["name"],
            "method": fields.get("method"),  # records of the last release have none
            "status": Status(fields["status"]),
            "priority": int(fields.get("priority", 0)),  # records of the last release have none
            "attempt": int(fields["attempt"]),
            "created_ms": int(fields["created_ms"]),
            "started_ms": number("started_ms"),
            "finished_ms": finished,
            "expires_ms": None if finished is None or retention is None else finished + retention,
            "progress": Progress.model_validate_json(fields["progress"]),
            "error": JobError.model_validate_json(fields["error"]) if "error" in fields else None,
            "labels": json.loads(fields["labels"]),
            "key": fields.get("key"),
        }


def _task(job_id: str) -> TaskId:
    """Return the task that does all of a job's work."""
    return TaskId(job=job_id, stage=Stage.MERGE)


def _kind(fields: Mapping[str, str]) -> JobKind:
    return JobKind(fields.get("kind", JobKind.MERGE))  # records that were stored before there were kinds have none


def _summary(fields: Mapping[str, str]) -> MergeSummary | ScoreResult | None:
    """Return the result in short. Records of releases that kept no summary have the result itself."""
    summary = MergeSummary if _kind(fields) is JobKind.MERGE else ScoreResult
    if "summary" in fields:
        return summary.model_validate_json(fields["summary"])
    if "result" in fields:
        result = json.loads(fields["result"])
        return summary.model_validate({name: result[name] for name in summary.model_fields if name in result})
    return None


def _earlier(remembered: str, digest: str) -> Created:
    job_id, _, earlier_digest = remembered.partition(" ")
    return Created(job_id, existing=True, same_body=earlier_digest == digest)
