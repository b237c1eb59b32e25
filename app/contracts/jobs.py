"""The job record, its states, and the tasks that do its work."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict

from worker.engine.catalog.contracts.report import MergeResult, MergeSummary, ScoreResult
from worker.engine.catalog.primitives.paths import Told, told

JOB_ID = r"[0-9a-f]{28}"


class JobKind(StrEnum):
    """The kind of result that a job makes."""

    MERGE = "merge"
    SCORES = "scores"


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)

    @property
    def predecessors(self) -> frozenset["Status"]:
        """The states from which this one may be entered; every write is a compare-and-set against them."""
        return frozenset(before for before, after in TRANSITIONS.items() if self in after)


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED, Status.FAILED}),
    Status.RUNNING: frozenset({Status.QUEUED, Status.CANCELLING, Status.SUCCEEDED, Status.FAILED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset({Status.QUEUED}),
    Status.CANCELLED: frozenset({Status.QUEUED}),
}


class Gone(StrEnum):
    """Why a job is gone."""

    DELETED = "deleted"
    EXPIRED = "expired"


def absence(job_id: str, gone: Gone | None) -> str:
    """Say why a job is not there: it was deleted or kept for its time, or there never was one."""
    if gone is None:
        return f"there is no job {job_id}"
    return f"job {job_id} was deleted" if gone is Gone.DELETED else f"job {job_id} was kept for its time and is removed"


class PhaseName(StrEnum):
    QUEUED = "queued"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    SCORING = "scoring"
    SEARCHING = "searching"
    MERGING = "merging"
    ALIGNING = "aligning"
    EVALUATING = "evaluating"
    COMPARING = "comparing"
    PUBLISHING = "publishing"
    DONE = "done"


class ModelProgress(BaseModel):
    """The part of a step's units that is one model's."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    done: int
    """Number of the model's units that are done."""
    total: int
    """Number of the model's units."""


class Progress(BaseModel):
    """Progress of a job. `fraction` is that of the whole job, and never falls within an attempt."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    phase: PhaseName = PhaseName.QUEUED
    """Step that the job is at."""
    done: int = 0
    """Number of units of this step that are done."""
    total: int = 0
    """Number of units of this step; 0 where it is not known."""
    unit: str = ""
    """What is counted, such as `examples` or `tensors`."""
    fraction: float = 0.0
    """Share of the whole job that is done, from 0 to 1."""
    eta_seconds: float | None = None
    """Estimate of the seconds that are left; null where there is none."""
    models: dict[str, ModelProgress] = {}
    """Units of this step that are each model's, by its name; empty in steps that do not go model by model."""


class ErrorCode(StrEnum):
    INVALID_REQUEST = "invalid_request"
    INVALID_CHECKPOINT = "invalid_checkpoint"
    INCOMPATIBLE_CHECKPOINTS = "incompatible_checkpoints"
    INVALID_DATASET = "invalid_dataset"
    INVALID_STATISTICS = "invalid_statistics"
    NUMERICAL_ERROR = "numerical_error"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"
    TIMEOUT = "timeout"
    WORKER_LOST = "worker_lost"
    STORAGE_ERROR = "storage_error"
    INTERNAL = "internal"


class JobError(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    code: ErrorCode
    """Stable code of the error."""
    message: Told
    """What went wrong, with the file, tensor or row, and what to do."""
    retryable: bool = False
    """Whether a retry may succeed without a change."""
    detail: Annotated[dict[str, Any], AfterValidator(told)] = {}
    """Facts about the error, by name."""


class Links(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    self: str
    """The job itself."""
    events: str
    """Its events, as a stream."""
    artifacts: str
    """The files that it made."""
    cancel: str
    """POST here to cancel it."""
    report: str
    """Its report page."""


class JobCore(BaseModel):
    """The fields that every view of a job has."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The job's id; ids sort by time."""
    kind: JobKind
    """What the job makes."""
    name: str
    """Title for people."""
    method: str | None = None
    """Name of the method that was asked for; null for jobs of releases that did not keep it. What `auto` chose is in
    the result."""
    status: Status
    """State of the job; the last three are final."""
    priority: int
    """Priority with which it waits: of a tenant's waiting jobs, those of the highest priority start first."""
    attempt: int
    """Number of times that the work was started."""
    created_at: AwareDatetime
    """Time at which it was accepted."""
    started_at: AwareDatetime | None
    """Time at which the first attempt began; null while it waits."""
    finished_at: AwareDatetime | None
    """Time at which it ended; null while it has not."""
    expires_at: AwareDatetime | None
    """Time at which the job and its artifact are removed; null while it has not ended."""
    progress: Progress
    """How far it is."""
    error: JobError | None
    """Why it failed; null unless it did."""
    labels: dict[str, str]
    """The labels of its request."""
    key: str | None
    """The caller's own name of the job, by which it was put; null for one that was posted."""
    links: Links
    """Paths of what belongs to it."""


class JobSummary(JobCore):
    """A job as `GET /jobs` lists it, without its request and without the candidates and trials of a search."""

    result: MergeSummary | ScoreResult | None
    """What the job found, in short; null until it has succeeded."""


class Job(JobCore):
    """The answer of `GET /jobs/{id}`."""

    request: dict[str, Any]
    """The request as it was accepted, with defaults filled in."""
    result: MergeResult | ScoreResult | None
    """What the job found; null until it has succeeded."""
    waiting_for: str | None = None
    """What a waiting job lacks beside its turn: a live worker, or one with the `device` that it asks for."""


class JobPage(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    data: list[JobSummary]
    """The jobs of this page, newest first."""
    next: str | None
    """Cursor of the next page, for `after`; null on the last."""


class RecordCore(BaseModel):
    """The fields that a job's record and its summary share, as they are stored."""

    id: str
    tenant: str
    key: str | None
    kind: JobKind
    name: str
    method: str | None = None
    status: Status
    priority: int
    attempt: int
    created_ms: int
    started_ms: int | None
    finished_ms: int | None
    expires_ms: int | None
    progress: Progress
    error: JobError | None
    labels: dict[str, str]

    def core(self) -> dict[str, Any]:
        """Return the fields of `JobCore`."""

        def time(ms: int | None) -> datetime | None:
            return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)

        return {
            "id": self.id,
            "kind": self.kind,
            "name": self.name,
            "method": self.method,
            "status": self.status,
            "priority": self.priority,
            "attempt": self.attempt,
            "created_at": time(self.created_ms),
            "started_at": time(self.started_ms),
            "finished_at": time(self.finished_ms),
            "expires_at": time(self.expires_ms),
            "progress": self.progress,
            "error": self.error,
            "labels": self.labels,
            "key": self.key,
            "links": Links(
                self=f"/jobs/{self.id}",
                events=f"/jobs/{self.id}/events",
                artifacts=f"/jobs/{self.id}/artifacts",
                cancel=f"/jobs/{self.id}/cancel",
                report=f"/jobs/{self.id}/report",
            ),
        }


class RecordSummary(RecordCore):
    """The part of a record that a list of jobs shows."""

    result: MergeSummary | ScoreResult | None

    def public(self) -> JobSummary:
        return JobSummary(**self.core(), result=self.result)


class Record(RecordCore):
    """A job as it is stored.

    `revision` is the number of its latest event; `artifact` names the published artifact; `inputs` is the state of each
    checkpoint when the job was accepted, by its reference; `request_id` is that of the request that made it, and
    `traceparent` names its span.
    """

    revision: int
    request: dict[str, Any]
    result: MergeResult | ScoreResult | None
    inputs: dict[str, str]
    artifact: str | None
    request_id: str | None
    traceparent: str | None

    def public(self, waiting_for: str | None = None) -> Job:
        return Job(**self.core(), request=self.request, result=self.result, waiting_for=waiting_for)


class Outcome(BaseModel):
    """A job's status, and the name of its artifact if there is one."""

    model_config = ConfigDict(frozen=True)

    status: Status
    artifact: str | None


class Stage(StrEnum):
    """The work that a task does; the worker has one function for each stage."""

    MERGE = "merge"
    """All of a job's work, whichever kind of job it is, except what its shards do. Its task is the main one."""
    SCORE = "score"
    """A shard of the job's scoring."""


class TaskState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SPLIT = "split"
    """The task waits for its shards."""
    DONE = "done"


class TaskId(BaseModel):
    """The unit of queue, lease and fencing: one shard of one stage of one job."""

    model_config = ConfigDict(frozen=True)

    job: str
    stage: Stage
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.job}-{self.stage}-{self.shard}"

    @classmethod
    def parse(cls, text: str) -> "TaskId":
        job, stage, shard = text.split("-")
        return cls(job=job, stage=Stage(stage), shard=int(shard))


class Attempt(BaseModel):
    """A claimed task. `number` is the fencing token: a write with an older one is refused."""

    model_config = ConfigDict(frozen=True)

    task: TaskId
    number: int

    @property
    def is_of_shard(self) -> bool:
        return self.task.stage is Stage.SCORE
