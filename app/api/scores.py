from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response
from fastapi.responses import FileResponse

from app.api.conditional import PreconditionsOf
from app.api.dependencies import CallerOf, ServicesOf
from app.api.files import ArchiveResponse, serve
from app.api.openapi import ACCEPTED, RANGES, file_responses, problems
from app.api.paging import Limit
from app.api.prefer import Wait
from app.api.strict_route import StrictRoute
from app.api.submitting import IdempotencyKey, submitted
from app.contracts.errors import Problem, ProblemError
from app.contracts.jobs import Job
from app.contracts.requests import ScoreRequest
from app.contracts.scores import ScoresEntry, ScoresPage
from app.storage.files import Damaged
from app.storage.objects.errors import StorageAway
from app.storage.statistics.kept import KeptStatistic
from worker.engine.catalog.contracts.statistics import KeptName
from worker.engine.catalog.primitives.errors import EngineError

router = APIRouter(tags=["scores"], route_class=StrictRoute)

EXAMPLE: dict[str, Any] = {
    "method": {"name": "mask_fisher"},
    "models": [
        {
            "name": "topics",
            "checkpoint": "local:experts/topics",
            "dataset": {"source": "local:tasks/topics/train.jsonl", "label": "label"},
        }
    ],
}
ScoreBody = Annotated[ScoreRequest, Body(openapi_examples={"one expert": {"value": EXAMPLE}})]
PREFIX = "sha256:"
DIGEST = r"^(sha256:)?[0-9a-f]{64}$"


@router.post("/scores", status_code=202, responses=ACCEPTED | problems(409, 507))
async def score(
    body: ScoreBody,
    response: Response,
    services: ServicesOf,
    caller: CallerOf,
    wait: Wait,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Queue a job that computes a method's statistics of each model and keeps them; nothing is merged.

    Later jobs that need the same statistics, merges among them, find them. `Prefer: wait=N` waits up to N (at most 60)
    seconds for the job's end; the status is 202 then too.
    """
    return await submitted(services, body, caller, idempotency_key, wait, response)


@router.get("/scores")
def list_scores(
    services: ServicesOf,
    caller: CallerOf,
    checkpoint: Annotated[
        str | None, Query(pattern=DIGEST, description="Only of the checkpoint with this digest")
    ] = None,
    statistic: Annotated[KeptName | None, Query(description="Only of this kind")] = None,
    limit: Limit = 20,
    after: Annotated[
        str | None, Query(pattern=r"^[0-9a-f]{14}-[0-9a-f]{64}$", description="The `next` of the page before")
    ] = None,
) -> ScoresPage:
    """List the statistics that are kept, newest first."""
    wanted = checkpoint and checkpoint.removeprefix(PREFIX)

    def matches(kept: KeptStatistic) -> bool:
        facts = kept.about.facts
        is_wanted = wanted is None or facts.checkpoint.removeprefix(PREFIX) == wanted
        return is_wanted and (statistic is None or facts.statistic == statistic)

    matching = filter(matches, services.statistics.of(caller.tenant).newest(after))
    present = ((kept, entry) for kept in matching if (entry := _entry(kept)) is not None)
    with reading():
        found = list(islice(present, limit + 1))
    page = found[:limit]
    return ScoresPage(data=[entry for _, entry in page], next=page[-1][0].age_key if len(found) > limit else None)


@router.get("/scores/{digest}", response_class=FileResponse, responses=file_responses("*/*"), openapi_extra=RANGES)
def get_scores(
    digest: Annotated[str, Path(pattern=DIGEST, description="A statistic's digest")],
    services: ServicesOf,
    caller: CallerOf,
    preconditions: PreconditionsOf,
    request: Request,
) -> Response:
    """Send a statistic's safetensors file, with ranges and a strong ETag, or its several files as a tar.

    For a large file in object storage, the answer is 307 with a signed URL, if the service is set so.
    """
    address = digest.removeprefix(PREFIX)
    with reading(address):
        kept = services.statistics.of(caller.tenant).get(address)
        files, held = kept.open()
    if len(files) == 1:
        return serve(files[0], held, preconditions, redirects=request.method == "GET")
    return ArchiveResponse(files, kept.title, kept.about.created_at, held)


@contextmanager
def reading(address: str = "") -> Iterator[None]:
    """Turn what stands against reading statistics into a ProblemError."""
    try:
        yield
    except StorageAway as error:
        detail = f"the statistics cannot be read: {error}"
        raise ProblemError(Problem.STORAGE_UNAVAILABLE, detail, None, **{"Retry-After": "10"}) from error
    except (FileNotFoundError, Damaged, EngineError) as error:
        raise ProblemError(Problem.NOT_FOUND, f"no statistic {address} is kept") from error


def _entry(kept: KeptStatistic) -> ScoresEntry | None:
    """Return the entry of a statistic; None when it is gone."""
    used_at = kept.used_at()
    if used_at is None:
        return None
    facts, origin = kept.about.facts, kept.about.origin
    return ScoresEntry(
        digest=kept.address,
        statistic=facts.statistic,
        checkpoint=facts.checkpoint,
        source=origin.checkpoint,
        dataset=origin.dataset,
        examples=origin.examples,
        estimator=facts.estimator,
        precision=facts.precision,
        seed=facts.seed,
        paper=bool(facts.paper),
        population=facts.population,
        max_length=facts.tokens.max_length,
        batch_tokens=origin.batch_tokens,
        bytes=kept.about.bytes,
        created_at=kept.about.created_at,
        used_at=used_at,
        href=f"/scores/{kept.address}",
    )
