"""Runs a worker's tasks. It is the only place where the engine's output becomes contracts."""

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from redis.exceptions import RedisError

from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    JobError,
    ModelProgress,
    PhaseName,
    Progress,
    Record,
    Stage,
    Status,
)
from app.contracts.references import ReferenceError
from app.observability.context import add_facts, concerning
from app.observability.metrics import ENGINE_RESTARTS, counted
from app.observability.traces import Tracer
from app.storage.artifacts.store import ArtifactStore
from app.storage.files import stored_bytes
from app.storage.inputs import OnBytes
from app.storage.jobs import JobStore
from app.storage.objects.errors import StorageAway
from app.storage.queue import WORK
from app.storage.searches import SearchFolder
from app.storage.sources import Sources
from app.storage.sources.source import FetchedInput, InputKind, SourceUnavailable
from app.storage.tasks import CutScoring, NewShard, ScoringPhase
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult, ShardResult
from worker.engine.catalog.contracts.spec import MergeSpec, ScoreSpec, ShardSpec, ShardWork, StoreSpec
from worker.engine.catalog.primitives.errors import (
    EngineError,
    InvalidCheckpoint,
    InvalidDataset,
    InvalidStatistics,
    StorageError,
)
from worker.engine_process import (
    CutIntoShards,
    EngineDied,
    EngineProcess,
    EngineStopped,
    Failed,
    Finished,
    Predicted,
    Progressed,
    Ready,
    ShardDone,
    as_job_error,
)
from worker.progress import LEAST_FRACTION, ProgressMeter
from worker.provenance import attest
from worker.publishing import with_publications
from worker.specs import Inputs, checkpoints_of, job_spec, phases_of, shard_spec
from worker.trace import AttemptTrace

if TYPE_CHECKING:  # cryptography is loaded where there is a key
    from app.storage.signing_keys import SigningKey

TICK_S = 0.2  # a stop, a lost lease or a finished job is noticed within this time
RECORD_INTERVAL_S = 0.5  # twice a second is as fast as a person reads
REDIS_RETRY_S = 1.0
LONGEST_RENEWAL_S = 2.0  # renewing is also how the worker hears of a cancel, which is to take effect within 5 s

INVALID: Mapping[InputKind, Callable[[str, str], EngineError]] = {
    "checkpoint": InvalidCheckpoint,
    "rows": InvalidDataset,
    "statistics": InvalidStatistics,
}
"""Errors of the kinds of input."""

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class WorkerStopping(Exception):
    """The worker was asked to end while Redis was away; the lease will hand the task on."""


class Unwanted(Exception):
    """Nobody wants the attempt whose inputs are fetched. `status` is its job's, or None for a lost lease."""

    def __init__(self, status: Status | None) -> None:
        super().__init__(f"the job is {status}")
        self.status = status


@dataclass(frozen=True)
class TenantStorage:
    """The places in which jobs of one tenant find their inputs, and keep statistics."""

    sources: Sources
    statistics: StoreSpec
    inputs: ExitStack = field(default_factory=ExitStack)
    """Closed when what was fetched is not read any more."""


@dataclass(frozen=True)
class Storage:
    """Everything that a worker reads and writes, except what its engine reads and writes."""

    store: JobStore
    of_tenant: Callable[[str], TenantStorage]
    artifacts: ArtifactStore
    searches: SearchFolder
    signing_key: "SigningKey | None" = None
    """The key that signs the provenance of artifacts."""
    publish_seconds: float = 3600
    """Time for publishing an artifact at further places."""


class TaskRunner:
    """Runs one task at a time in the engine process. Its lease is renewed at least four times within its time.

    Args:
        worker: the worker's name.
        max_engine_bytes: memory above which an engine process is replaced after a job.
        is_stopping: tells whether the worker was asked to end; the task is handed back then.
        wake: called after an attempt, since the next task may start then.
        tracer: makes the spans of attempts; without one, nobody receives any.
        shard_seconds: time that a shard of long scoring takes, about; None: scoring is not cut.
    """

    def __init__(
        self,
        worker: str,
        storage: Storage,
        engine: EngineProcess,
        max_engine_bytes: int,
        is_stopping: Callable[[], bool],
        wake: Callable[[], object],
        tracer: Tracer | None = None,
        shard_seconds: float | None = None,
    ) -> None:
        self._worker = worker
        self._store = storage.store
        self._of_tenant = storage.of_tenant
        self._artifacts = storage.artifacts
        self._searches = storage.searches
        self._signing_key = storage.signing_key
        self._publish_seconds = storage.publish_seconds
        self._engine = engine
        self._renew_interval = min(storage.store.tasks.lease_seconds / 4, LONGEST_RENEWAL_S)
        self._max_engine_bytes = max_engine_bytes
        self._is_stopping = is_stopping
        self._wake = wake
        self._shard_seconds = shard_seconds
        self._holds = ""  # reference of the checkpoint that the last shard read, which the engine has in memory
        self._tracer = tracer or Tracer()
        self._trace: AttemptTrace | None = None  # of the attempt in hand
        self._inputs = ExitStack()  # of the attempt in hand
        self._why_ended = "stopped"  # reason why there is no engine process, as metrics name it

    @property
    def functions(self) -> dict[str, Callable[..., None]]:
        """Table of the functions that a message from the queue may run."""
        # Messages of the last release ask for the stage of a task that they name.
        return {WORK: self.run, Stage.MERGE.value: lambda _: self.run()}

    def run(self) -> None:
        """Make an attempt at the task that is next. Whatever happens, the record says so and the worker lives on."""
        if not self.look_after_engine():
            logger.warning("the work is left to others: there is no engine")
            return  # it goes on waiting, and a worker is woken again
        attempt = self._store.tasks.claim(self._worker, self._holds, self._engine.device)
        if attempt is None:
            logger.info("no task waits any more that may start now")
            return
        shard = {"shard": attempt.task.shard} if attempt.is_of_shard else {}
        with concerning(job=attempt.task.job, attempt=attempt.number, **shard):
            self._run(attempt)

    def _run(self, attempt: Attempt) -> None:
        logger.info("the attempt starts")
        try:
            self._attempt(attempt)
        except EngineDied as death:
            self._engine_died(attempt, death)
        except WorkerStopping:
            logger.info("stopping while Redis is away")
        except EngineError as error:
            self._fail(attempt, as_job_error(error))
        except StorageAway as error:
            message = f"the artifact cannot be published: {error}; try again"
            self._fail(attempt, JobError(code=ErrorCode.STORAGE_ERROR, message=message, retryable=True))
        except OSError as error:
            code = ErrorCode.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ErrorCode.STORAGE_ERROR
            message = f"the data folder cannot be written: {error.strerror}"
            self._fail(attempt, JobError(code=code, message=message, retryable=True))
        except RedisError as error:
            logger.warning("Redis is away, the lease runs out: %s", error)
        except Exception:
            logger.exception("the attempt failed unexpectedly")
            self._engine.kill()  # it may still be at work, and the next task must not get its events
            message = "unexpected error in the worker; its log has the trace"
            self._fail(attempt, JobError(code=ErrorCode.INTERNAL, message=message))
        finally:
            self._inputs.close()
            if self._trace is not None:
                self._trace.ends()
                self._trace = None
            self.look_after_engine()
            with suppress(RedisError):  # a sweep does it too
                self._wake()

    def _attempt(self, attempt: Attempt) -> None:
        record = self._store.records.get(attempt.task.job)
        if record is None:
            return
        self._trace = AttemptTrace(self._tracer, record, attempt)
        made_by = {"request_id": record.request_id} if record.request_id else {}
        add_facts(tenant=record.tenant, **made_by, **self._trace.facts)
        try:
            spec, meter = self._shard(attempt, record) if attempt.is_of_shard else self._job(attempt, record)
        except Unwanted as end:
            self._gives_up(attempt, end)
            return
        event = self._follow(attempt, spec, meter)
        if isinstance(event, Failed):
            if event.error.code is ErrorCode.OUT_OF_MEMORY:
                self._engine.kill()  # libraries remember what they could not make
            self._fail(attempt, event.error)
        elif isinstance(event, CutIntoShards):
            self._split(attempt, record, event, meter)
        elif isinstance(event, ShardDone):
            self._finish_shard(attempt, spec, event.result)
        elif isinstance(event, Finished):
            self._trace.enters(PhaseName.PUBLISHING)
            status = self._renew(attempt, meter.update(PhaseName.PUBLISHING, 0, 1, "artifacts"))
            if status is Status.RUNNING:
                self._publish(attempt, record, spec.folder, event.result)
            else:
                self._withdraw(attempt, status)

    def _follow(
        self, attempt: Attempt, spec: MergeSpec | ScoreSpec | ShardSpec, meter: ProgressMeter
    ) -> CutIntoShards | ShardDone | Finished | Failed | None:
        """Have the engine run a specification, and return how that ended; None where the attempt ended before."""
        self._engine.run(spec)
        recorded = time.monotonic()
        recorded_progress = meter.current
        while True:
            for event in self._engine.poll(TICK_S):
                if isinstance(event, Progressed):
                    if self._trace is not None:
                        self._trace.enters(event.phase)
                    meter.update(event.phase, event.done, event.total, event.unit, event.models)
                elif not isinstance(event, Ready | Predicted):
                    return event
            if self._is_stopping():
                self._hand_back(attempt)
                return None
            now = time.monotonic()
            news = meter.current if meter.current != recorded_progress else None
            if now - recorded >= (RECORD_INTERVAL_S if news else self._renew_interval):
                recorded = now
                recorded_progress = meter.current
                status = self._renew(attempt, news)
                if status is not Status.RUNNING:
                    self._engine.kill()
                    self._withdraw(attempt, status)
                    return None

    def _gives_up(self, attempt: Attempt, end: Unwanted) -> None:
        if self._is_stopping():
            self._hand_back(attempt)
        else:
            self._withdraw(attempt, end.status)

    def _while_wanted(self, attempt: Attempt) -> OnBytes:
        """Make a function that raises Unwanted once nobody wants the attempt any more."""
        renewed = time.monotonic()

        def on_bytes(done: int, total: int) -> None:
            nonlocal renewed
            if self._is_stopping():
                raise Unwanted(Status.QUEUED)
            if time.monotonic() - renewed >= self._renew_interval:
                renewed = time.monotonic()
                status = self._renew(attempt, None)
                if status is not Status.RUNNING:
                    raise Unwanted(status)

        return on_bytes

    def _renew(self, attempt: Attempt, progress: Progress | None) -> Status | None:
        """Renew the lease. Returns the job's status, or None when the attempt is no longer ours.

        While Redis is away, the attempt counts as ours, because nobody knows better.
        """
        try:
            is_counted = progress is None or not attempt.is_of_shard or progress.phase is PhaseName.SCORING
            return self._store.tasks.renew(attempt, progress if is_counted else None)
        except RedisError as error:
            logger.warning("Redis is away: %s", error)
            return Status.RUNNING

    def _keeping(self, attempt: Attempt, call: Callable[[], Answer]) -> Answer:
        """Return the outcome of a call that may take longer than the lease, as flushing or removing large files."""
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(copy_context().run, call)
            while outcome not in wait([outcome], timeout=self._renew_interval).done:
                self._renew(attempt, None)
            return outcome.result()

    def _withdraw(self, attempt: Attempt, status: Status | None) -> None:
        """Remove all traces of an attempt whose result nobody wants: the job was cancelled, or the lease was lost."""
        self._discard(attempt)
        if self._insist(lambda: self._store.tasks.acknowledge_cancel(attempt)):
            self._searches.remove(attempt.task.job)
            self._ends("cancelled")
        else:
            self._ends("too late", failed=True)

    def _publish(self, attempt: Attempt, record: Record, folder: Path, result: MergeResult | ScoreResult) -> None:
        start = time.monotonic()
        if isinstance(result, MergeResult):
            attest(folder, record, self._signing_key)
        try:
            if isinstance(result, MergeResult):
                result = self._with_publications(attempt, record, folder, result)
            artifact = self._keeping(attempt, lambda: self._artifacts.publish(attempt, self._while_wanted(attempt)))
        except Unwanted as end:
            self._gives_up(attempt, end)
            return
        started = self._insist(lambda: self._store.records.get(attempt.task.job))
        queued = ((started or record).started_ms or record.created_ms) - record.created_ms
        timings = result.timings.model_copy(
            update={"queue_seconds": queued / 1000, "publish_seconds": round(time.monotonic() - start, 3)}
        )
        final = result.model_copy(update={"timings": timings})
        size = stored_bytes(self._artifacts.open(artifact).files)
        if self._insist(lambda: self._store.tasks.succeed(attempt, final, artifact, size)):
            self._searches.remove(attempt.task.job)
            self._ends("succeeded")
        else:
            self._withdraw(attempt, None)

    def _with_publications(self, attempt: Attempt, record: Record, folder: Path, result: MergeResult) -> MergeResult:
        """Publish a complete artifact at the further places that the request names. Raises Unwanted."""
        renewed = 0.0
        recorded: Progress | None = None

        def keep(progress: Progress) -> None:
            nonlocal renewed, recorded
            if self._is_stopping():
                raise Unwanted(Status.QUEUED)
            if time.monotonic() - renewed >= self._renew_interval:
                status = self._renew(attempt, progress if progress != recorded else None)
                renewed, recorded = time.monotonic(), progress
                if status is not Status.RUNNING:
                    raise Unwanted(status)

        return with_publications(result, record, folder, self._publish_seconds, TICK_S, keep)

    def _split(self, attempt: Attempt, record: Record, cut: CutIntoShards, meter: ProgressMeter) -> None:
        """End the attempt, and leave the job's scoring to shards, of which this worker may take one at once."""
        self._discard(attempt)
        checkpoints = checkpoints_of(record)
        start, span = meter.span(PhaseName.SCORING)
        told = meter.current if meter.current.phase is PhaseName.SCORING else Progress()
        left = Counter[str]()
        for shard in cut.shards:
            left[shard.model] += shard.examples
        totals = {model: max(of.total, left[model]) for model, of in told.models.items()} or dict(left)
        scoring = CutScoring(
            [
                NewShard(shard.model, shard.examples, checkpoints[shard.model], shard.model_dump_json())
                for shard in cut.shards
            ],
            ScoringPhase(start=start, span=span, total=sum(totals.values()), least=LEAST_FRACTION),
            {model: ModelProgress(done=total - left[model], total=total) for model, total in totals.items()},
            cut.batch_tokens,
        )
        self._holds = checkpoints[cut.shards[0].model]
        if self._insist(lambda: self._store.tasks.split(attempt, scoring)):
            self._ends("split")
        else:
            self._withdraw(attempt, None)

    def _finish_shard(self, attempt: Attempt, spec: MergeSpec | ScoreSpec | ShardSpec, result: ShardResult) -> None:
        if not isinstance(spec, ShardSpec):
            raise TypeError("the engine measured a shard that it was not asked for")
        done = (spec.work.model, result.seconds, spec.work.examples)
        if self._insist(lambda: self._store.tasks.finish_shard(attempt, *done)):
            self._ends("succeeded")
        else:
            self._withdraw(attempt, None)

    def _discard(self, attempt: Attempt) -> None:
        """Remove what the attempt left beside statistics. A shard leaves nothing; artifacts are those of main tasks."""
        if not attempt.is_of_shard:
            self._artifacts.discard(attempt)

    def _fail(self, attempt: Attempt, error: JobError) -> None:
        self._discard(attempt)
        self._ends(error.code, failed=True)
        try:
            if not self._insist(lambda: self._store.tasks.fail(attempt, error)):
                self._withdraw(attempt, None)
        except WorkerStopping:
            logger.info("stopping while Redis is away")

    def _hand_back(self, attempt: Attempt) -> None:
        """Put the task back so that another worker, or this one's successor, begins at once."""
        self._engine.kill()
        self._discard(attempt)
        self._store.tasks.release(attempt, lost=False)
        self._ends("handed back")

    def _ends(self, outcome: str, *, failed: bool = False) -> None:
        """Say how the attempt ends, in the log and in its trace."""
        logger.info("the attempt ends: %s", outcome)
        if self._trace is not None:
            self._trace.outcome, self._trace.failed = outcome, failed

    def _engine_died(self, attempt: Attempt, death: EngineDied) -> None:
        logger.warning("%s", death)
        self._why_ended = death.reason
        if death.out_of_memory:
            message = "the engine process was killed for want of memory; use a worker with more, or smaller models"
            self._fail(attempt, JobError(code=ErrorCode.OUT_OF_MEMORY, message=message))
            return
        self._discard(attempt)
        try:
            self._insist(lambda: self._store.tasks.release(attempt, lost=True))
        except WorkerStopping:
            logger.info("stopping while Redis is away")

    def look_after_engine(self) -> bool:
        """Replace an engine process that died, hangs or holds too much memory. Call it often between jobs.

        Returns whether there is an engine process that can take a job.
        """
        reason = "ended"
        try:
            self._engine.poll(0)
            if self._engine.resident_bytes() <= self._max_engine_bytes:
                return True
            reason = "grew"
            logger.info("the engine process grew too large and is replaced")
        except OSError:
            pass
        except EngineStopped:
            reason = self._why_ended
            logger.info("another engine process is started")
        except EngineDied as death:
            reason = death.reason
            logger.warning("%s, and is replaced", death)
        if self._is_stopping():
            return False
        try:
            self._engine.start()
        except EngineDied as death:
            logger.error("%s while it started", death)
            return False
        self._why_ended = "stopped"
        with suppress(RedisError):  # the engine is there, whether it is counted or not
            self._store.sums.add(counted(ENGINE_RESTARTS, reason))
        return True

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        """Return the outcome of a store call, however long Redis is away. Raises Stopping when asked to end."""
        while True:
            try:
                return call()
            except RedisError as error:
                logger.warning("Redis is away: %s", error)
                if self._is_stopping():
                    raise WorkerStopping from error
                time.sleep(REDIS_RETRY_S)

    def _job(self, attempt: Attempt, record: Record) -> tuple[MergeSpec | ScoreSpec, ProgressMeter]:
        """Make the engine's input for all of a job's work, and fetch everything that the engine does not fetch."""
        folder = self._keeping(attempt, lambda: self._artifacts.begin(attempt))
        own = self._of_tenant(record.tenant)
        self._inputs = own.inputs
        done = self._insist(lambda: self._store.tasks.shards_done(attempt))
        shared = {
            "seconds": done.seconds,
            "elapsed_seconds": done.elapsed_seconds,
            "batch_tokens": done.batch_tokens,
        }
        common = {
            "folder": folder,
            "store": own.statistics,
            "shard_seconds": None if done.goes_on else self._shard_seconds,
            "shared": shared,
        }
        inputs = Inputs(record, partial(self._fetch, attempt, own.sources))
        spec = job_spec(record, inputs, common, lambda: self._searches.begin(attempt))
        if not done.goes_on:
            return spec, ProgressMeter(phases_of(spec))
        taken = (self._store.clock() - (record.started_ms or record.created_ms)) / 1000
        return spec, ProgressMeter(phases_of(spec), before=record.progress, taken=taken)

    def _shard(self, attempt: Attempt, record: Record) -> tuple[ShardSpec, ProgressMeter]:
        """Make the engine's input for a shard, and fetch everything that the engine does not fetch. Raises Unwanted."""
        text = self._insist(lambda: self._store.tasks.work_of_shard(attempt))
        if text is None:
            raise Unwanted(None)
        work = ShardWork.model_validate_json(text)
        own = self._of_tenant(record.tenant)
        self._inputs = own.inputs
        inputs = Inputs(record, partial(self._fetch, attempt, own.sources))
        spec = shard_spec(record, work, inputs, own.statistics)
        self._holds = checkpoints_of(record)[work.model]
        phases = [PhaseName.DOWNLOADING] if spec.names_the_hub else []
        return spec, ProgressMeter([*phases, PhaseName.SCORING])

    def _fetch(
        self, attempt: Attempt, sources: Sources, reference: str, kind: InputKind, state: str | None
    ) -> FetchedInput:
        """Fetch an input as `fetched`, while the lease is kept. Raises Unwanted too."""
        renewed = time.monotonic()

        def on_bytes(done: int, total: int) -> None:
            nonlocal renewed
            if self._is_stopping():
                raise Unwanted(Status.QUEUED)
            if self._trace is not None:
                self._trace.enters(PhaseName.DOWNLOADING)
            if time.monotonic() - renewed >= RECORD_INTERVAL_S:
                renewed = time.monotonic()
                progress = Progress(phase=PhaseName.DOWNLOADING, done=done, total=total, unit="bytes")
                status = self._renew(attempt, progress)
                if status is not Status.RUNNING:
                    raise Unwanted(status)

        return self._insist(lambda: fetched(sources, reference, kind, state, on_bytes))


def fetched(sources: Sources, reference: str, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
    """Fetch an input; its errors are the engine's.

    Raises:
        StorageError: the storage fails.
        InvalidCheckpoint, InvalidDataset, InvalidStatistics: the input, which was there when the job was accepted, is
            not there now.
    """
    try:
        return sources.fetch(reference, kind, state, on_bytes)
    except SourceUnavailable as error:
        raise StorageError(f"{error}; try again", source=reference) from error
    except ReferenceError as error:
        raise INVALID[kind](reference, str(error)) from error
