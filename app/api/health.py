from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from redis.exceptions import RedisError

from app.api.dependencies import ServicesOf
from app.api.strict_route import PublicRoute
from app.contracts.errors import FieldError, Problem, ProblemError

router = APIRouter(tags=["health"], route_class=PublicRoute)


class Health(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    status: str = "ok"
    """Always `ok`."""


class Readiness(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    status: str = "ready"
    """Always `ready`."""
    workers: int
    """Number of live workers."""


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers, however busy its threads are."""
    return Health()


@router.get("/readyz")
def readyz(services: ServicesOf) -> Readiness:
    """Redis answers, artifacts can be written, and at least one worker is there."""
    missing: list[FieldError] = []
    workers = 0
    try:
        workers = services.store.workers.count()
        if workers == 0:
            missing.append(FieldError(field="workers", message="no worker is alive"))
    except RedisError:
        missing.append(FieldError(field="redis", message="Redis does not answer"))
    if not services.artifacts.is_writable():
        missing.append(FieldError(field="storage", message="the data folder cannot be written"))
    if missing:
        raise ProblemError(Problem.NOT_READY, "; ".join(m.message for m in missing), missing, **{"Retry-After": "1"})
    return Readiness(workers=workers)
