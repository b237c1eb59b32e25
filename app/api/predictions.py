from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.concurrency import run_in_threadpool

from app.api import artifacts
from app.api.dependencies import RecordOf, ServicesOf
from app.api.openapi import problems
from app.api.strict_route import StrictRoute
from app.contracts.predictions import PredictionRequest
from app.services.predictions import require_merge
from worker.engine.catalog.contracts.prediction import Prediction

router = APIRouter(tags=["jobs"], route_class=StrictRoute)

EXAMPLES = {
    "texts": {"value": {"model": "topics", "rows": ["The match ended in a draw.", "Shares fell by two per cent."]}},
    "pairs": {"value": {"model": "topics", "rows": [{"text": "It rains.", "text_pair": "The street is wet."}]}},
}


@router.post("/jobs/{job_id}/predict", responses=problems(409, 504))
async def predict(
    body: Annotated[PredictionRequest, Body(openapi_examples=EXAMPLES)],
    record: RecordOf,
    services: ServicesOf,
    request: Request,
) -> Prediction:
    """Try a merge: the answers of one of its experts, of the plain average and of the merge to a few rows.

    A worker answers between two tasks, within `MASKMERGE_PREDICT_SECONDS` (30 s), and keeps the models for the next
    rows. Rows and answers are not kept, and the job does not change. Models that classify rows or words, that give a
    number or that write are tried; others are refused with `not_available`. The expert and the average are made of the
    job's inputs, which must be there as they were.

    409 when the job is no merge that has succeeded; 504 with `no_answer` when no worker answers in time.
    """
    require_merge(record)
    listing = await run_in_threadpool(artifacts.list_files, record, services)
    files = [file.name for file in listing.files]
    return await services.predictions.predict(record, body, files, request.is_disconnected)
