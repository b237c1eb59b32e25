"""Accepts jobs: checks the request, then makes the record."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from anyio.to_thread import run_sync
from pydantic import ValidationError
from redis.exceptions import RedisError

from app.contracts.api_keys import Caller
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Gone, JobKind, Outcome, Record, Status
from app.contracts.limits import TenantLimits
from app.contracts.plans import Plan
from app.contracts.requests import MergeRequest, ScoreRequest
from app.contracts.webhooks import JobWebhook
from app.observability.context import request_id, traceparent
from app.services.checks import Accepted
from app.services.inspection import Inspectors, sources
from app.services.limits import Room, refusing, require_priority
from app.services.previews import Preview, RowsAsked
from app.services.targets import Targets
from app.services.webhooks import Webhooks
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.records import Created, Idempotency, NewJob
from app.storage.sources.job import job_named

logger = logging.getLogger(__name__)


class Jobs:
    """The use cases behind `POST /merge`, `POST /merge/validate` and `POST /scores`."""

    def __init__(
        self,
        store: JobStore,
        queue: TaskQueue,
        inspectors: Inspectors,
        webhooks: Webhooks,
        room: Room,
        limits: TenantLimits,
        idempotency_seconds: int,
        targets: Targets,
    ) -> None:
        self._store = store
        self._queue = queue
        self._inspectors = inspectors
        self._webhooks = webhooks
        self._room = room
        self._limits = limits
        self._idempotency_seconds = idempotency_seconds
        self._targets = targets

    async def submit(
        self, request: MergeRequest | ScoreRequest, caller: Caller, *, idempotency_key: str | None = None
    ) -> Record:
        """Return the caller's queued job, or the one that the same key made before.

        Raises:
            ProblemError: the recipe or an input is refused, the key came with another body, the tenant has as much as
                it may have, or the disk has no room.
        """
        once = Idempotency(idempotency_key or "", _digest(request), self._idempotency_seconds)
        created = await self._created(request, caller, once)
        if created.existing and not created.same_body:
            raise ProblemError(
                Problem.IDEMPOTENCY_MISMATCH, "this Idempotency-Key made a job from another body; use a new key"
            )
        record = await run_sync(self._begin, created)
        if record is None:
            raise ProblemError(Problem.CONFLICT, "the job of this Idempotency-Key was deleted; use a new key")
        return record

    async def put(self, request: MergeRequest, caller: Caller, key: str) -> tuple[Record, bool]:
        """Return the job of the caller's tenant of this name, and whether it is new.

        Raises:
            ProblemError: as `submit`, or the job of this name has another recipe.
        """
        created = await self._created(request, caller, Idempotency(key, _digest(request), None))
        record = await run_sync(self._begin, created)
        if record is None:
            raise ProblemError(Problem.CONFLICT, f"the job '{key}' was deleted just now; put it again")
        if not created.same_body:
            detail = f"job {record.id} has the name '{key}' and another recipe; delete it, or use another name"
            raise ProblemError(Problem.CONFLICT, detail)
        return record, not created.existing

    async def _created(self, request: MergeRequest | ScoreRequest, caller: Caller, once: Idempotency) -> Created:
        """Make a job, unless its key made one before."""
        # Redis is asked first, key or not: the checks may take longer than it should take to hear that it is away.
        created = await run_sync(self._made_before, caller.tenant, once)
        if created is None:
            webhook = await self._webhook(request, caller)
            accepted = await self._check(request, caller.tenant)
            job = NewJob(
                accepted.request,
                request.title,
                request.labels,
                accepted.states,
                JobKind.MERGE if isinstance(request, MergeRequest) else JobKind.SCORES,
                request.deadline_seconds,
                caller.tenant,
                request.priority,
                webhook,
                0 if accepted.plan is None else accepted.plan.bytes_to_write,
                request_id(),
                traceparent(),
                request.device,
            )
            created = await run_sync(self._create, job, once if once.key else None)
        elif not created.same_body and await self._asks_the_same(created.job_id, request, caller.tenant):
            created = replace(created, same_body=True)
        return created

    async def _asks_the_same(self, job_id: str, request: MergeRequest | ScoreRequest, tenant: str) -> bool:
        """Return whether a job was made of the same recipe, although the digests of the bodies differ.

        Digests are over all fields with their defaults, so a release that adds a field has others than the one before.
        """
        record = await run_sync(self._store.records.get, job_id)
        if record is None:
            return False
        try:
            recipes = (record.request, (await self._check(request, tenant)).request)
            before, now = (type(request).model_validate(recipe).model_dump_json() for recipe in recipes)
        except (ProblemError, ValidationError):
            return False
        return before == now

    def _made_before(self, tenant: str, once: Idempotency) -> Created | None:
        """Return the job that the key made before; without one, there must be a place in the queue for another."""
        created = self._store.records.remembered(tenant, once)
        if created is None:
            with refusing():
                self._store.records.require_place(tenant)
        return created

    def _create(self, job: NewJob, once: Idempotency | None) -> Created:
        with self._room.deciding(job.tenant), refusing():
            room, uploaded = self._room.left(job.bytes_to_write), self._room.uploaded(job.tenant)
            return self._store.records.create(job, once, room, uploaded)

    def _begin(self, created: Created) -> Record | None:
        """Wake a worker for a job if it is new, and return its record as it was before; None when the job was deleted.

        So the answer to whoever made a job tells it as queued, however soon a worker takes it.
        """
        record = self._store.records.get(created.job_id)
        if not created.existing:
            self._wake()
        return record

    def retry(self, job_id: str, tenant: str) -> Record | None:
        """Queue a tenant's failed or cancelled job anew, and return it as queued; None when it is neither, or deleted.

        Raises ProblemError where the tenant has as much as it may have, or the disk has no room.
        """
        with self._room.deciding(tenant), refusing():
            room = self._room.left(self._store.records.bytes_to_write(job_id))
            if not self._store.records.retry(job_id, room, self._room.uploaded(tenant)):
                return None
        record = self._store.records.get(job_id)
        self._wake()
        return record

    def _wake(self) -> None:
        try:
            self._queue.wake()
        except RedisError as error:  # the job is stored, so it is accepted; the reaper wakes a worker
            logger.warning("a job waits for Redis: %s", error)

    async def plan(self, request: MergeRequest, caller: Caller) -> Plan:
        """Return what the caller's job would do. Raises ProblemError, as `submit`."""
        await self._webhook(request, caller)
        plan = (await self._check(request, caller.tenant)).plan
        assert plan is not None  # noqa: S101 - for the type checker: every merge has one
        await run_sync(self._room.require, plan.bytes_to_write)
        lacking = await run_sync(self._store.workers.lacking_for, request.device)
        return plan.model_copy(update={"waiting_for": lacking})

    def waiting_for(self, record: Record) -> str | None:
        """Say which worker a waiting job lacks; None where one is alive, and for a job that does not wait."""
        if record.status is not Status.QUEUED:
            return None
        return self._store.workers.lacking_for(record.request.get("device"))

    async def preview(self, asked: Sequence[RowsAsked], caller: Caller) -> list[Preview]:
        """Return the first rows of data sets that the caller may name. Raises ProblemError, see `Inspectors`."""
        named = {job_id for one in asked if (job_id := job_named(one.checkpoint or "")) is not None}
        outcomes = await run_sync(self._outcomes, named, caller.tenant) if named else {}
        return await self._inspectors.preview(asked, caller.tenant, outcomes)

    async def _webhook(self, request: MergeRequest | ScoreRequest, caller: Caller) -> JobWebhook | None:
        return None if request.webhook is None else await run_sync(self._webhooks.accepted, request.webhook, caller)

    async def _check(self, request: MergeRequest | ScoreRequest, tenant: str) -> Accepted:
        require_priority(self._limits.of(tenant), request.priority)
        self._targets.require(request, tenant)
        named = {job_id for source in sources(request) if (job_id := job_named(source)) is not None}
        outcomes = await run_sync(self._outcomes, named, tenant) if named else {}
        return await self._inspectors.check(request, tenant, outcomes)

    def _outcomes(self, ids: set[str], tenant: str) -> dict[str, Outcome | Gone]:
        found = ((job_id, self._store.records.outcome(job_id, tenant)) for job_id in ids)
        return {job_id: outcome for job_id, outcome in found if outcome is not None}


def _digest(request: MergeRequest | ScoreRequest) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
