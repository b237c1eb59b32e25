"""Dependencies that routes share: the services, and a job by its id."""

from typing import Annotated

from fastapi import Depends, Path, Request

from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Record, absence
from app.services.composition import Services


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(get_services)]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{28}$", description="A job's id")]


def get_record(job_id: JobId, services: ServicesOf) -> Record:
    record = services.store.records.get(job_id)
    if record is None:
        raise no_job(job_id, services)
    return record


def no_job(job_id: str, services: Services) -> ProblemError:
    """Return the problem for a job that is not there: it says why the job is gone, or that there never was one."""
    return ProblemError(Problem.NOT_FOUND, absence(job_id, services.store.records.gone(job_id)))


RecordOf = Annotated[Record, Depends(get_record)]
