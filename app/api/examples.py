"""An example of every answer that is JSON, for the OpenAPI document.

Each is made by the answer's own model, so that it has the fields that answers have.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel

from app.api.health import Health, Readiness
from app.contracts.api_keys import CreatedKey, Key, KeyList, Scope
from app.contracts.artifacts import FileEntry, Listing
from app.contracts.jobs import Job, JobKind, JobPage, PhaseName, Progress, Record, RecordSummary, Status
from app.contracts.methods import MethodDescription, MethodList
from app.contracts.plans import Plan, PlannedModel
from app.contracts.requests import MergeRequest
from app.contracts.scores import ScoresEntry, ScoresPage
from app.contracts.uploads import UploadStatus
from app.contracts.webhooks import (
    CreatedSecret,
    Delivery,
    DeliveryAttempt,
    DeliveryLog,
    DeliveryState,
    ReceiverTestOutcome,
    WebhookEvent,
)
from worker.engine.catalog.contracts.prediction import LabelAnswer, Prediction, RowPrediction
from worker.engine.catalog.contracts.report import MergeResult, MetricResult, ModelResult, Timings
from worker.engine.catalog.methods import METHODS

RECIPE: dict[str, Any] = {
    "method": {"name": "mask_fisher"},
    "models": [
        {
            "name": name,
            "checkpoint": f"local:experts/{name}",
            "dataset": {"source": f"local:tasks/{name}/train.jsonl", "label": "label"},
            "evaluation": {"source": f"local:tasks/{name}/validation.jsonl"},
        }
        for name in ("topics", "sentiment")
    ],
}
BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEGAN_MS = int(BEGAN.timestamp() * 1000)
JOB_ID = f"{BEGAN_MS:012x}5b0e5f0c8a7d4c21"
KEY_ID = "0f8b2c4d6e1a3957"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0bc822cd15d6c15b0f00a0"
WEIGHTS_BYTES = 437_958_648


def answers() -> dict[str, BaseModel]:
    """Return an example for each answer's schema, by the schema's name."""
    return {type(example).__name__: example for example in _answers()}


def queued_job() -> Job:
    """Return the answer to a request that made a job."""
    return _record(Status.QUEUED, None).public()


def _answers() -> Iterator[BaseModel]:
    yield Health()
    yield Readiness(workers=1)
    yield _plan()
    succeeded = _record(Status.SUCCEEDED, _result())
    yield succeeded.public()
    summary = RecordSummary.model_validate(
        {**succeeded.model_dump(include=set(RecordSummary.model_fields)), "result": succeeded.result}
    )
    yield JobPage(data=[summary.public()], next=None)
    files = [
        FileEntry(
            name="models/topics/model.safetensors",
            bytes=WEIGHTS_BYTES,
            sha256=SHA256,
            media_type="application/octet-stream",
            href=f"/jobs/{JOB_ID}/artifacts/models/topics/model.safetensors",
        )
    ]
    yield Listing(files=files, archive=f"/jobs/{JOB_ID}/archive")
    yield _scores()
    yield _prediction()
    yield UploadStatus(
        sha256=SHA256,
        kind="file",
        name="train.jsonl",
        bytes=1_048_576,
        received_bytes=1_048_576,
        complete=True,
        expires_at=BEGAN + timedelta(days=1),
        reference=f"upload:{SHA256}",
    )
    yield MethodList(data=[MethodDescription.model_validate(METHODS["average"].describe())])
    key = Key(
        id=KEY_ID,
        prefix=f"mm_{KEY_ID}",
        name="nightly merges",
        tenant="search",
        scopes=[Scope.WRITE],
        created_at=BEGAN,
        expires_at=None,
        last_used_at=None,
        revoked_at=None,
    )
    yield KeyList(data=[key])
    yield CreatedKey(**key.model_dump(), key=f"{key.prefix}_…")
    yield from _webhooks()


def _webhooks() -> Iterator[BaseModel]:
    arrived = DeliveryAttempt(at=BEGAN + timedelta(seconds=41), seconds=0.18, status=204, error=None)
    delivery = Delivery(
        n=1,
        id="msg_2f4b8c6d0e1a39575b0e5f0c",
        event=WebhookEvent.SUCCEEDED,
        state=DeliveryState.DELIVERED,
        created_at=BEGAN + timedelta(seconds=40),
        next_attempt_at=None,
        attempts=[arrived],
    )
    yield delivery
    yield DeliveryLog(data=[delivery], disabled_at=None)
    yield CreatedSecret.model_validate(
        {"secret": "whsec_…", "signer": KEY_ID, "former_until": BEGAN + timedelta(days=1)}
    )
    yield ReceiverTestOutcome(**arrived.model_dump(), id=delivery.id, delivered=True)


def _request() -> dict[str, Any]:
    return MergeRequest.model_validate(RECIPE).model_dump(mode="json")


def _record(status: Status, result: MergeResult | None) -> Record:
    is_new = result is None
    done = Progress(phase=PhaseName.DONE, done=1, total=1, fraction=1.0, eta_seconds=0.0)
    return Record(
        id=JOB_ID,
        tenant="search",
        key=None,
        kind=JobKind.MERGE,
        name="topics + sentiment",
        method="mask_fisher",
        status=status,
        priority=0,
        attempt=0 if is_new else 1,
        created_ms=BEGAN_MS,
        started_ms=None if is_new else BEGAN_MS + 300,
        finished_ms=None if is_new else BEGAN_MS + 40_000,
        expires_ms=None,
        progress=Progress() if is_new else done,
        error=None,
        labels={},
        revision=1 if is_new else 90,
        request=_request(),
        result=result,
        inputs={},
        artifact=None,
        request_id=None,
        traceparent=None,
    )


def _result() -> MergeResult:
    metric = MetricResult(
        metric="accuracy",
        examples=514,
        expert=0.963,
        average=0.901,
        merged=0.944,
        merged_kept_head=0.926,
        retention=0.98,
        interval=(0.957, 0.997),
        intervals={"expert": (0.944, 0.977), "average": (0.872, 0.924), "merged": (0.922, 0.961)},
        differences={},
    )
    models = [
        ModelResult(
            name=name,
            checkpoint=f"local:experts/{name}",
            digest=SHA256,
            examples=1000,
            batch_tokens=2048,
            score_seconds=14.2,
            score_cached=False,
            aligned_examples=1000,
            weight_share=0.5,
            parameters={},
        )
        for name in ("topics", "sentiment")
    ]
    return MergeResult(
        method=_request()["method"],
        timings=Timings(queue_seconds=0.3, load_seconds=0.9, score_seconds=28.4, merge_seconds=1.6),
        peak_memory_bytes=1_900_000_000,
        device="cpu",
        notes=[],
        models=models,
        metrics={"topics": metric},
        mean_retention=0.98,
        min_retention=0.98,
    )


def _plan() -> Plan:
    models = [
        PlannedModel(
            name=name,
            architecture="BertForSequenceClassification",
            task="sequence_classification",
            head="aligned",
            tokens=None,
            new_tokens=None,
        )
        for name in ("topics", "sentiment")
    ]
    return Plan(
        bytes_to_read=2 * WEIGHTS_BYTES,
        bytes_to_write=WEIGHTS_BYTES,
        peak_memory_bytes=1_900_000_000,
        least_memory_bytes=900_000_000,
        examples=2000,
        aligned_examples=2000,
        candidates=None,
        trials=None,
        tensors=199,
        owners={"heads": 96, "neurons": 36, "rest": 67},
        models=models,
        tokens=None,
        notes=[],
        request=_request(),
    )


def _scores() -> ScoresPage:
    entry = ScoresEntry(
        digest=SHA256,
        statistic="mask_fisher",
        checkpoint=SHA256,
        source="local:experts/topics",
        dataset="local:tasks/topics/train.jsonl",
        examples=1000,
        estimator="sampled",
        precision="float32",
        seed=0,
        paper=False,
        population=1543,
        max_length=512,
        batch_tokens=2048,
        bytes=150_528,
        created_at=BEGAN,
        used_at=BEGAN,
        href=f"/scores/{SHA256}",
    )
    return ScoresPage(data=[entry], next=None)


def _prediction() -> Prediction:
    def answer(sports: float) -> LabelAnswer:
        return LabelAnswer(label="sports", probabilities={"sports": sports, "business": round(1 - sports, 2)})

    return Prediction(
        task="classification",
        rows=[RowPrediction(expert=answer(0.98), average=answer(0.71), merged=answer(0.95))],
    )
