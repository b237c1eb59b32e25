"""Accepting a job: its checks, then its record."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore

from redis.exceptions import RedisError

from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Kind, Record, Stage, TaskId
from app.contracts.requests import MergeRequest, ModelRequest, ScoreRequest
from app.services.checks import Accepted, Checker, Plan
from app.storage.artifacts import ArtifactFolder
from app.storage.hub import Hub
from app.storage.inputs import JobInputs, LocalInputs
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue

HUB_REQUESTS = 8  # at once, of the 40 threads that answer
HUB_QUEUE_S = 1.0

logger = logging.getLogger(__name__)


class Jobs:
    """The use cases behind `POST /merge`, `POST /merge/validate` and `POST /scores`."""

    def __init__(
        self,
        store: JobStore,
        queue: TaskQueue,
        inputs: LocalInputs,
        job_inputs: JobInputs,
        artifacts: ArtifactFolder,
        idempotency_seconds: int,
    ) -> None:
        self._store = store
        self._queue = queue
        self._inputs = inputs
        self._job_inputs = job_inputs
        self._artifacts = artifacts
        self._hub_places = BoundedSemaphore(HUB_REQUESTS)
        self._idempotency_seconds = idempotency_seconds

    def submit(self, request: MergeRequest | ScoreRequest, idempotency_key: str | None) -> Record:
        """A queued job, or the one that the same key made before.

        Raises:
            ProblemError: the recipe or an input is refused, or the key came with another body.
        """
        digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        created = self._store.remembered(idempotency_key, digest) if idempotency_key else None
        if created is None:
            accepted = self._check(request)
            created = self._store.create(
                accepted.request,
                request.title,
                request.labels,
                (idempotency_key, digest) if idempotency_key else None,
                self._idempotency_seconds,
                accepted.states,
                Kind.MERGE if isinstance(request, MergeRequest) else Kind.SCORES,
            )
        if created.existing and not created.same_body:
            raise ProblemError(
                Problem.IDEMPOTENCY_MISMATCH, "this Idempotency-Key made a job from another body; use a new key"
            )
        if not created.existing:
            self._dispatch(TaskId(job=created.job_id, stage=Stage.MERGE))
        record = self._store.get(created.job_id)
        if record is None:
            raise ProblemError(Problem.CONFLICT, "the job of this Idempotency-Key was deleted; use a new key")
        return record

    def retry(self, job_id: str) -> bool:
        """Queue a failed or cancelled job anew. False when it is neither."""
        task = self._store.retry(job_id)
        if task is not None:
            self._dispatch(task)
        return task is not None

    def _dispatch(self, task: TaskId) -> None:
        try:
            self._queue.dispatch(task)
        except RedisError as error:  # the job is stored, so it is accepted; the reaper hands it over
            logger.warning("job %s waits for Redis: %s", task.job, error)

    def plan(self, request: MergeRequest) -> Plan:
        plan = self._check(request).plan
        assert plan is not None  # noqa: S101 - for the type checker: every merge has one
        return plan

    def _check(self, request: MergeRequest | ScoreRequest) -> Accepted:
        with self._hub_for(request) as hub:
            return Checker(self._inputs, self._job_inputs, self._artifacts, hub).check(request)

    @contextmanager
    def _hub_for(self, request: MergeRequest | ScoreRequest) -> Iterator[Hub]:
        """A slow hub may hold up some requests that name it, never all that the process can answer."""
        hub = Hub()
        if not any(source.startswith("hf:") for source in _sources(request)):
            yield hub
            return
        if not self._hub_places.acquire(timeout=HUB_QUEUE_S):
            detail = f"{HUB_REQUESTS} requests are waiting for the hub already"
            raise ProblemError(Problem.HUB_UNAVAILABLE, detail, None, **{"Retry-After": "10"})
        try:
            yield hub
        finally:
            self._hub_places.release()


def _sources(request: MergeRequest | ScoreRequest) -> Iterator[str]:
    """Every reference in the request."""
    for model in request.models:
        yield model.checkpoint
        if model.dataset is not None:
            yield model.dataset.source
        if isinstance(model, ModelRequest) and model.evaluation is not None:
            yield model.evaluation.source
    if isinstance(request, MergeRequest) and request.base is not None:
        yield request.base
