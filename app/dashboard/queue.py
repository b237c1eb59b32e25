"""Workers, and the jobs that wait for them or run on them."""

from itertools import chain, islice

from fastapi import APIRouter, Request, Response

from app.api.dependencies import CallerOf, ServicesOf
from app.contracts.api_keys import Scope
from app.contracts.jobs import Status
from app.dashboard.pages import page
from app.dashboard.route import DashboardRoute

router = APIRouter(route_class=DashboardRoute, include_in_schema=False)

MOST = 50  # jobs of a state that are listed


@router.get("/dashboard/queue")
def queue(request: Request, services: ServicesOf, caller: CallerOf) -> Response:
    """Show how many workers live and what waits. Names of workers and of other tenants are for the scope admin."""
    store, is_admin = services.store, caller.may(Scope.ADMIN)
    active = chain.from_iterable(
        islice(store.records.newest(status=status, tenant=caller.tenant), MOST)
        for status in (Status.RUNNING, Status.CANCELLING, Status.QUEUED)
    )
    return page(
        request,
        "queue.html",
        workers=store.workers.count(),
        names=store.workers.names() if is_admin else [],
        counts=[of for of in store.tasks.counts() if is_admin or of.tenant == caller.tenant],
        now_ms=store.clock(),
        jobs=[job.public() for job in active],
        most=MOST,
    )
