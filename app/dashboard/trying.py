"""A merge is tried on a few texts, from its job's page."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from app.api import predictions
from app.api.dependencies import RecordOf, ServicesOf
from app.contracts.errors import FieldError, ProblemError
from app.contracts.predictions import MOST_ROWS, PredictionRequest
from app.dashboard.drafts import problems_of
from app.dashboard.pages import page
from app.dashboard.route import DashboardRoute, form_of
from worker.engine.catalog.primitives.words import message_of

router = APIRouter(route_class=DashboardRoute, include_in_schema=False)


@router.post("/dashboard/jobs/{job_id}/predict")
async def try_merge(request: Request, record: RecordOf, services: ServicesOf) -> Response:
    """Show what the expert, the plain average and the merge answer to the texts of a form, or why they do not."""
    fields = dict(await form_of(request))
    texts = [line for line in fields.get("texts", "").splitlines() if line.strip()]
    shown: dict[str, Any] = {"answers": None, "errors": []}
    status = 200
    try:
        asked = PredictionRequest.model_validate({"model": fields.get("model", ""), "rows": texts})
        shown["answers"] = await predictions.predict(asked, record, services, request)
    except ValidationError as error:
        status, shown["errors"] = 422, [_said(one["loc"], message_of(one)) for one in error.errors()]
    except ProblemError as error:
        status, shown["errors"] = error.problem.status, problems_of(error)
    return page(
        request,
        "try.html",
        200 if "hx-request" in request.headers else status,  # htmx shows no part of a page that is refused
        job=record,
        models=[model["name"] for model in record.request["models"]],
        model=fields.get("model"),
        texts=texts,
        most=MOST_ROWS,
        **shown,
    )


def _said(location: tuple[int | str, ...], message: str) -> FieldError:
    return FieldError(field=".".join(map(str, location)), message=message)
