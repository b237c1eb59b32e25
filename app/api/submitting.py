"""The common part of the routes that make jobs."""

from contextlib import suppress
from typing import Annotated

from fastapi import Header, Response
from fastapi.concurrency import run_in_threadpool
from redis.exceptions import RedisError

from app.api.prefer import applied
from app.contracts.api_keys import Caller
from app.contracts.jobs import Job, Record
from app.contracts.requests import MergeRequest, ScoreRequest
from app.observability.context import add_facts
from app.services.composition import Services

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=255, description="Your own text: repeated with the same body, it makes no second job"
    ),
]


async def submitted(
    services: Services,
    request: MergeRequest | ScoreRequest,
    caller: Caller,
    idempotency_key: str | None,
    wait: int | None,
    response: Response,
) -> Job:
    """Submit a request, and return the job as `answered` does."""
    record = await services.jobs.submit(request, caller, idempotency_key=idempotency_key)
    return await answered(services, record, wait, response)


async def answered(services: Services, record: Record, wait: int | None, response: Response) -> Job:
    """Return an accepted job, after waiting for its end for at most `wait` seconds. Headers say where it is."""
    add_facts(job=record.id)
    if wait is not None:
        with suppress(RedisError):  # the job is accepted, so no failure to watch it may say otherwise
            await services.watcher.end(record.id, record.revision, wait)
            later = await run_in_threadpool(services.store.records.get, record.id)
            record = later or record  # deleted meanwhile
    lacking = None
    with suppress(RedisError):
        lacking = await run_in_threadpool(services.jobs.waiting_for, record)
    response.headers.update({"Location": f"/jobs/{record.id}", **applied(wait)})
    return record.public(lacking)
