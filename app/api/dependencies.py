"""Dependencies that routes share: the services, and a job by its id.

Those that wait for nothing are coroutines: FastAPI runs all others in threads, and each change of threads takes as long
as the rest of a short answer.
"""

from typing import Annotated

from fastapi import Depends, Path, Request

from app.contracts.api_keys import Caller
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import JOB_ID, Record, absence
from app.services.composition import Services


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(get_services)]
JobId = Annotated[str, Path(pattern=f"^{JOB_ID}$", description="A job's id")]


async def get_caller(request: Request) -> Caller:
    """Return who sends the request, as its route has found out; see `StrictRoute`."""
    caller: Caller = request.state.caller
    return caller


CallerOf = Annotated[Caller, Depends(get_caller)]


def get_record(job_id: JobId, services: ServicesOf, caller: CallerOf) -> Record:
    """Return a job of the caller's tenant. Raises ProblemError: for the caller, there are no others."""
    return _record(job_id, caller.tenant, services)


def read_again(record: Record, services: Services) -> Record:
    """Return a job as it is now. Raises ProblemError when it is gone."""
    return _record(record.id, record.tenant, services)


def no_job(job_id: str, tenant: str, services: Services) -> ProblemError:
    """Return the problem for a job that is not there: it says why the job is gone, or that there never was one."""
    return ProblemError(Problem.NOT_FOUND, absence(job_id, services.store.records.gone(job_id, tenant)))


def _record(job_id: str, tenant: str, services: Services) -> Record:
    record = services.store.records.get(job_id)
    if record is None or record.tenant != tenant:
        raise no_job(job_id, tenant, services)
    return record


RecordOf = Annotated[Record, Depends(get_record)]
