"""The worker process: a light RQ worker and its engine process."""

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import Any

from redis.exceptions import RedisError
from rq import SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import DequeueStrategy

from app.contracts.devices import lanes_for
from app.contracts.jobs import Attempt, Outcome, Status, TaskId
from app.contracts.settings import Settings
from app.observability.logs import configure
from app.observability.traces import open_tracer
from app.storage.artifacts import open_artifacts
from app.storage.artifacts.store import ArtifactStore, artifact_name
from app.storage.connection import connect, connect_for_rq
from app.storage.jobs import JobStore
from app.storage.keys import Keys
from app.storage.queue import TaskQueue, queue_of_predictions, queue_of_tasks
from app.storage.reaper import SWEEP_S, Reaper, Repeater
from app.storage.searches import SearchFolder
from app.storage.sources import Sources
from app.storage.sources.source import SourceContext
from app.storage.statistics import sweep_statistics
from app.storage.tenants import roots_of, statistics_of, statistics_of_others
from app.storage.versions import NEWER_DATA_STATUS, NewerData, upgrade_folder, upgrade_redis
from worker.engine.catalog.contracts.spec import StoreSpec
from worker.engine.catalog.primitives.paths import hide
from worker.engine_process import EngineDied, EngineProcess
from worker.predicting import Predictor
from worker.tasks import REDIS_RETRY_S, Storage, TaskRunner, TenantStorage

BEAT_S = 2.0
LOOK_S = 2  # a worker without a job looks after its engine this often
RQ_BEAT_S = 20.0
TIDY_S = 600.0  # folders that crashes left cost nothing but space
ALIVE_S = 10.0  # a worker that has not beaten for so long does not count as live

logger = logging.getLogger("worker")
Functions = Mapping[str, Callable[..., None]]


class TaskWorker(SimpleWorker):
    """RQ's loop around a fixed table of functions.

    A message may name any function of Python, so names are looked up in the table and never imported. On SIGTERM the
    task in hand is given back; RQ's own handler would wait for it to end, and writes to Redis inside the handler.
    """

    is_stopping = False
    between_jobs: Callable[[], object] = staticmethod(lambda: None)
    """Called every few seconds while there is no job."""
    queues_of_tasks: Collection[str] = ()
    """Names of those of its queues that are not of predictions."""
    _is_busy = False

    @property
    def dequeue_timeout(self) -> int:
        return LOOK_S

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ calls it whenever it has waited for a job."""
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
            return
        if not self._is_busy and not self.is_stopping:
            self.between_jobs()
        last = self.last_heartbeat
        if last is None or (datetime.now(UTC) - last).total_seconds() > RQ_BEAT_S:
            with suppress(RedisError):  # only RQ's own lists of workers need it
                super().heartbeat(timeout)

    def check_for_suspension(self, burst: bool) -> None:
        with suppress(RedisError):
            super().check_for_suspension(burst)

    def run_maintenance_tasks(self) -> None:
        with suppress(RedisError):
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """Waits for the next job, even while Redis does not answer; RQ would end the worker then."""
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            except RedisError as error:
                logger.warning("Redis does not answer: %s", error)
                self.between_jobs()
                time.sleep(REDIS_RETRY_S)

    def reorder_queues(self, reference_queue: Any) -> None:
        """Take the other kind of what waits next: a task after rows to try, and rows after a task."""
        super().reorder_queues(reference_queue)
        was_task = reference_queue.name in self.queues_of_tasks
        self._ordered_queues.sort(key=lambda queue: (queue.name in self.queues_of_tasks) == was_task)

    def execute_job(self, job: Job, queue: Any) -> None:
        self._is_busy = True
        try:
            super().execute_job(job, queue)
        except RedisError as error:  # RQ's own lists do not count
            logger.warning("Redis does not answer: %s", error)
        finally:
            self._is_busy = False

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.is_stopping = self._stop_requested = True
        if not self._is_busy:
            raise StopRequested


def job_class(functions: Functions) -> type[Job]:
    """Make RQ's class of jobs that only runs functions of the table."""

    class TableJob(Job):
        @property
        def func(self) -> Callable[..., None]:
            try:
                return functions[self.func_name or ""]
            except KeyError:
                raise NoSuchJobError(f"no function {self.func_name!r} in the worker's table") from None

    return TableJob


def run(settings: Settings) -> int:
    """Work until asked to stop. Returns the exit status: 0 when asked, 1 when Redis is away or went away for good, 7
    when a newer release has written what is there."""
    if settings.redis_url is None:
        print("MASKMERGE_REDIS_URL is not set", file=sys.stderr)  # noqa: T201
        return 2
    url = settings.redis_url.get_secret_value()
    try:
        redis = connect(url, patience=3)
        artifacts = open_artifacts(settings.artifact_store, settings.data_dir, settings.object_storage)
        signing_key = None
        if settings.signing_key:
            from app.storage.signing_keys import SigningKey

            signing_key = SigningKey(settings.signing_key)
    except ValueError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    hide(*settings.hidden_folders)
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    store = JobStore(
        redis,
        settings.prefix,
        settings.lease_seconds,
        settings.max_losses,
        limits=settings.limits,
        replicas=settings.replicas,
    )
    artifacts.prepare()
    try:
        upgrade_folder(settings.data_dir)
        upgrade_redis(redis, Keys(settings.prefix))
    except NewerData as error:
        logger.error("%s", error)
        return NEWER_DATA_STATUS
    except RedisError as error:
        logger.error("Redis is away: %s", error)
        return 1
    rq_redis = connect_for_rq(url)
    queue = TaskQueue(rq_redis, settings.queue, store)
    searches = SearchFolder(settings.data_dir)
    cores = len(os.sched_getaffinity(0))
    threads = settings.threads or max(1, cores // settings.workers)
    engine = EngineProcess(threads, settings.heartbeat_seconds, settings.stall_seconds, settings.device)
    try:
        engine.start()
    except EngineDied as death:
        logger.error("%s while it started", death)
        return 1
    predictions, tasks = (
        [name_of(settings.queue, lane) for lane in lanes_for(engine.device)]
        for name_of in (queue_of_predictions, queue_of_tasks)
    )
    functions: dict[str, Callable[..., None]] = {}
    worker = TaskWorker(
        [*predictions, *tasks],
        name=name,
        connection=rq_redis,
        serializer=JSONSerializer,
        job_class=job_class(functions),
        worker_ttl=60,
    )
    worker.queues_of_tasks = tasks
    storage = Storage(
        store,
        partial(_of_tenant, settings, store, artifacts),
        artifacts,
        searches,
        signing_key,
        settings.publish_seconds,
    )
    tracer = open_tracer("worker")
    runner = TaskRunner(
        name,
        storage,
        engine,
        settings.max_worker_bytes,
        lambda: worker.is_stopping,
        queue.wake,
        tracer,
        settings.shard_seconds,
    )
    predictor = Predictor(storage, engine, runner.look_after_engine, lambda: worker.is_stopping)
    functions.update({**runner.functions, **predictor.functions})
    worker.between_jobs = runner.look_after_engine
    kept = settings.kept_in, settings.object_storage
    repeaters = [
        Repeater(BEAT_S, lambda: store.workers.beat(name, ALIVE_S, engine.device) if engine.is_well() else None),
        Repeater(SWEEP_S, Reaper(store, queue).sweep),
        Repeater(TIDY_S, lambda: artifacts.sweep(partial(_is_wanted, store))),
        Repeater(TIDY_S, partial(sweep_statistics, *kept, settings.max_statistics_bytes)),
        Repeater(TIDY_S, lambda: searches.sweep(partial(may_go_on, store))),
    ]
    for repeater in repeaters:
        repeater.start()
    try:
        worker.work(logging_level="WARNING", dequeue_strategy=DequeueStrategy.ROUND_ROBIN)
    finally:
        for repeater in repeaters:
            repeater.stop()
        engine.kill()
        tracer.close()
        store.workers.sign_off(name)
    return 0 if worker.is_stopping else 1


def _of_tenant(settings: Settings, store: JobStore, artifacts: ArtifactStore, tenant: str) -> TenantStorage:
    """Return where a tenant's jobs read their inputs, and keep statistics."""
    roots, outcome = roots_of(settings.local_roots, tenant), partial(store.records.outcome, tenant=tenant)
    statistics = StoreSpec(
        folder=statistics_of(settings.data_dir, tenant),
        max_bytes=settings.max_statistics_bytes,
        others=statistics_of_others(settings.data_dir, tenant),
        tenant=tenant,
    )
    held = ExitStack()
    context = SourceContext(
        roots, settings.data_dir, artifacts, outcome, tenant=tenant, objects=settings.object_storage, held=held
    )
    return TenantStorage(Sources(context), statistics, held)


def _is_wanted(store: JobStore, task: TaskId, attempt: int, published: bool) -> bool:
    """Return whether an attempt's folder is in use, or belongs to a job that this Redis does not know."""
    current = store.tasks.attempt_is_current(task, attempt)
    if current is None:
        return store.records.gone(task.job) is None
    if current:
        return True
    outcome = store.records.outcome(task.job)
    return (
        published
        and isinstance(outcome, Outcome)
        and outcome.artifact == artifact_name(Attempt(task=task, number=attempt))
    )


def may_go_on(store: JobStore, job: str) -> bool:
    """Return whether another attempt of the job may use the trials of earlier ones."""
    outcome = store.records.outcome(job)
    return isinstance(outcome, Outcome) and outcome.status not in (Status.SUCCEEDED, Status.CANCELLED)


if __name__ == "__main__":
    configured = Settings()
    configure(configured.log_level, configured.log_format, "worker")
    sys.exit(run(configured))
