"""Several jobs side by side: what each kept of its models, and in what their recipes differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import CallerOf, ServicesOf, get_record
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import JOB_ID, Record
from app.dashboard.pages import page
from app.dashboard.recipes import without_defaults
from app.dashboard.route import DashboardRoute
from worker.engine.catalog.contracts.report import MergeResult

router = APIRouter(route_class=DashboardRoute, include_in_schema=False)

MOST = 12  # jobs that fit on a page side by side
LONGEST = 200  # characters of a recipe's value
JobId = Annotated[str, Query(pattern=f"^{JOB_ID}$")]


@router.get("/dashboard/compare")
def compare(
    request: Request, services: ServicesOf, caller: CallerOf, job: Annotated[list[JobId] | None, Query()] = None
) -> Response:
    """Compare the jobs that are named; each must be one of the caller's tenant."""
    ids = list(dict.fromkeys(job or ()))
    if not 1 <= len(ids) <= MOST:
        raise ProblemError(Problem.MALFORMED, f"tick 1 to {MOST} jobs in the list of jobs")
    records = [get_record(job_id, services, caller) for job_id in ids]
    return page(
        request,
        "compare.html",
        jobs=[record.public() for record in records],
        rows=_metrics(records),
        differences=_differences(records),
    )


def _metrics(records: Sequence[Record]) -> list[tuple[str, str, list[dict[str, Any] | None]]]:
    """Return for each model and metric what each job has of it; None where a job has nothing."""
    results = [record.result if isinstance(record.result, MergeResult) else None for record in records]
    names = dict.fromkeys((n, m.metric) for r in results if r is not None for n, m in (r.metrics or {}).items())
    rows = []
    for name, metric in names:
        cells: list[dict[str, Any] | None] = []
        for result in results:
            found = ((result.metrics if result else None) or {}).get(name)
            cells.append(found.model_dump() if found is not None and found.metric == metric else None)
        rows.append((name, str(metric), cells))
    return rows


def _differences(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return each value of the recipes that is not the same in all of them."""
    flat = [dict(_flat(without_defaults(record))) for record in records]
    fields = dict.fromkeys(field for recipe in flat for field in recipe)
    rows = [(field, [recipe.get(field, "-") for recipe in flat]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _flat(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value of a recipe with its field, as models.0.weight."""
    inner: Mapping[Any, Any] | None = value if isinstance(value, dict) else None
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        inner = dict(enumerate(value))
    if inner is not None:
        for name, one in inner.items():
            yield from _flat(one, f"{field}.{name}".lstrip("."))
        return
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    yield field, text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
