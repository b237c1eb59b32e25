from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Response

from app.api.dependencies import ServicesOf
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
def merge(body: MergeBody, response: Response, services: ServicesOf, idempotency_key: IdempotencyKey = None) -> Job:
    """Queue a merge. The answer is the job; `Location` is where to watch it."""
    record = services.merges.submit(body, idempotency_key)
    response.headers["Location"] = f"/jobs/{record.id}"
    return record.public()


@router.post("/merge/validate")
def validate(body: MergeBody, services: ServicesOf) -> Plan:
    """Everything `POST /merge` checks, and what the job would do; nothing is queued."""
    return services.merges.plan(body)
