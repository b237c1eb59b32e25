from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Response
from fastapi.concurrency import run_in_threadpool
from redis.exceptions import RedisError

from app.api.dependencies import ServicesOf
from app.api.prefer import Wait, applied
from app.contracts.jobs import Job
from app.contracts.requests import MergeRequest
from app.services.merges import Plan

router = APIRouter(tags=["merge"])

EXAMPLE: dict[str, Any] = {
    "method": {"name": "mask_fisher"},
    "models": [
        {
            "name": name,
            "checkpoint": f"local:experts/{name}",
            "dataset": {"source": f"local:tasks/{name}/train.jsonl", "label": "label"},
            "evaluation": {"source": f"local:tasks/{name}/validation.jsonl"},
        }
        for name in ("topics", "sentiment")
    ],
}
MergeBody = Annotated[MergeRequest, Body(openapi_examples={"two experts": {"value": EXAMPLE}})]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


@router.post("/merge", status_code=202)
async def merge(
    body: MergeBody, response: Response, services: ServicesOf, wait: Wait, idempotency_key: IdempotencyKey = None
) -> Job:
    """Queue a merge. The answer is the job; `Location` is where to watch it.

    `Prefer: wait=N` waits up to N (at most 60) seconds for the job's end; the status is 202 then too.
    """
    record = await run_in_threadpool(services.merges.submit, body, idempotency_key)
    if wait is not None:
        with suppress(RedisError):  # the job is accepted, so no failure to watch it may say otherwise
            await services.watcher.end(record.id, record.revision, wait)
            later = await run_in_threadpool(services.store.get, record.id)
            record = later or record  # deleted meanwhile
    response.headers.update({"Location": f"/jobs/{record.id}", **applied(wait)})
    return record.public()


@router.post("/merge/validate")
def validate(body: MergeBody, services: ServicesOf) -> Plan:
    """Everything `POST /merge` checks, and what the job would do; nothing is queued."""
    return services.merges.plan(body)
