from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response

from app.api.dependencies import CallerOf, ServicesOf
from app.api.examples import RECIPE
from app.api.openapi import ACCEPTED, Responses, problems
from app.api.prefer import Wait
from app.api.submitting import IdempotencyKey, answered, submitted
from app.api.yaml_body import YAML_BODY, YamlRoute
from app.contracts.jobs import Job
from app.contracts.plans import Plan
from app.contracts.requests import MergeRequest

router = APIRouter(tags=["merge"], route_class=YamlRoute)

SEARCH: dict[str, Any] = {**RECIPE, "method": {"name": "auto", "candidates": ["average", "regmean"], "trials": 20}}
EXAMPLES: dict[str, Any] = {"two experts": {"value": RECIPE}, "the best of several methods": {"value": SEARCH}}
PUT: Responses = {
    **ACCEPTED,
    200: {"model": Job, "description": "The job that has this name already", "headers": ACCEPTED[202]["headers"]},
}
MergeBody = Annotated[MergeRequest, Body(openapi_examples=EXAMPLES)]


@router.post("/merge", status_code=202, responses=ACCEPTED | problems(409, 507), openapi_extra=YAML_BODY)
async def merge(
    body: MergeBody,
    response: Response,
    services: ServicesOf,
    caller: CallerOf,
    wait: Wait,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Queue a merge. The answer is the job; `Location` is where to watch it.

    The body is JSON, or the same as YAML, or a recipe of mergekit.

    `Prefer: wait=N` waits up to N (at most 60) seconds for the job's end; the status is 202 then too.
    """
    return await submitted(services, body, caller, idempotency_key, wait, response)


@router.post("/merge/validate", responses=problems(507), openapi_extra=YAML_BODY)
async def validate(body: MergeBody, services: ServicesOf, caller: CallerOf) -> Plan:
    """Check everything that `POST /merge` checks, and say what the job would do. Nothing is queued."""
    return await services.jobs.plan(body, caller)


@router.put("/merge/{key}", status_code=202, responses=PUT | problems(409, 507), openapi_extra=YAML_BODY)
async def put_merge(
    key: Annotated[str, Path(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$", description="Your own name of the job")],
    body: MergeBody,
    response: Response,
    services: ServicesOf,
    caller: CallerOf,
    wait: Wait,
) -> Job:
    """Queue a merge under a name of your own, once: 202 the first time, and 200 with the job when it is repeated.

    409 when the job of this name has another recipe. The name is free again when the job is deleted, or removed after
    its time. Each tenant has names of its own.
    """
    record, is_new = await services.jobs.put(body, caller, key)
    response.status_code = 202 if is_new else 200
    return await answered(services, record, wait, response)
