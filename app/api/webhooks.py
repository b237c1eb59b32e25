from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Response

from app.api.dependencies import CallerOf, JobId, RecordOf, ServicesOf
from app.api.openapi import problems
from app.api.strict_route import StrictRoute
from app.contracts.errors import Problem, ProblemError
from app.contracts.webhooks import CreatedSecret, Delivery, DeliveryLog, NewSecret, ReceiverTest, ReceiverTestOutcome

router = APIRouter(tags=["webhooks"], route_class=StrictRoute)

SECRETS: dict[str, Any] = {
    "the first, or one with a day to change over": {"value": {}},
    "at once": {"value": {"overlap_seconds": 0}},
}
TESTS: dict[str, Any] = {"a receiver": {"value": {"url": "https://hooks.example.org/merges"}}}


@router.get("/jobs/{job_id}/deliveries")
def list_deliveries(record: RecordOf, services: ServicesOf) -> DeliveryLog:
    """List what a job's webhook is told, newest first, with every attempt and when the next one is made."""
    return services.store.deliveries.log(record.id)


@router.post("/jobs/{job_id}/deliveries/{n}/redeliver", status_code=202)
def redeliver(
    job_id: JobId,
    n: Annotated[str, Path(pattern=r"^[1-9][0-9]{0,8}$", description="A delivery's number")],
    record: RecordOf,
    services: ServicesOf,
) -> Delivery:
    """Send a delivery again, now and with retries, under the same `webhook-id`.

    A webhook that was turned off by a 410 is on again.
    """
    delivery = services.store.deliveries.redeliver(record.id, int(n))
    if delivery is None:
        raise ProblemError(Problem.NOT_FOUND, f"job {job_id} has no delivery {n}")
    return delivery


@router.post("/webhooks/secret", status_code=201, responses=problems(409))
def make_secret(
    body: Annotated[NewSecret, Body(openapi_examples=SECRETS)],
    response: Response,
    services: ServicesOf,
    caller: CallerOf,
) -> CreatedSecret:
    """Make the secret that signs what webhooks of your API key's jobs are told, or a new one beside the former.

    It is in this answer, and nowhere else.
    """
    response.headers["Cache-Control"] = "no-store"
    return services.webhooks.rotate(caller, body.overlap_seconds)


@router.post("/webhooks/test", responses=problems(409))
async def try_receiver(
    body: Annotated[ReceiverTest, Body(openapi_examples=TESTS)], services: ServicesOf, caller: CallerOf
) -> ReceiverTestOutcome:
    """Send the event `webhook.test` to a receiver, once, and say how it went."""
    return await services.webhooks.test(body.url, caller)
