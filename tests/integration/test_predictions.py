"""Requests to try a merge: who may send them, and what they hear where no worker answers."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import NewKey, Scope
from app.contracts.jobs import ErrorCode, JobError, JobKind, Status
from app.contracts.predictions import PredictionOrder, PredictionOutcome, PredictionRequest
from app.contracts.requests import MergeRequest
from app.contracts.settings import Settings
from app.main import create_app
from app.services.predictions import MOST_WAITING
from app.storage.api_keys import ApiKeys
from app.storage.artifacts.folder import FolderStore
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.searches import SearchFolder
from tests.conftest import BASE_URL, HERE, RESULT, Answer, assert_problem, wait_until
from worker.__main__ import _of_tenant
from worker.engine_process import EngineProcess
from worker.predicting import Predictor
from worker.tasks import Storage

PREFIX = "predicting"
SECONDS = 0.3
BODY = {"model": "m", "rows": ["a text"]}


@pytest.fixture(scope="module")
def api(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The API without a worker. Its Redis is emptied between tests."""
    data = tmp_path_factory.mktemp("predictions")
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=data, queue=PREFIX, predict_seconds=SECONDS)
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        client.app.state.data = data  # type: ignore[attr-defined]
        yield client


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, PREFIX, 10, 5)


def merge(api: TestClient, store: JobStore, tenant: str = "default") -> str:
    """A job that has succeeded, of a model m, whose artifact has no files."""
    request = {"method": {"name": "average"}, "models": [{"name": "m", "checkpoint": "local:m"}]}
    job_id = store.records.create(NewJob(request, "merge", tenant=tenant)).job_id
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    artifacts = FolderStore(api.app.state.data)  # type: ignore[attr-defined]
    (artifacts.begin(attempt) / "manifest.json").write_text('{"files": []}')
    assert store.tasks.succeed(attempt, RESULT, artifacts.publish(attempt))
    return job_id


def test_without_a_worker_there_is_no_answer_in_time_and_nothing_is_left(
    api: TestClient, store: JobStore, redis: Redis
) -> None:
    job_id = merge(api, store)
    began = time.monotonic()
    answer = api.post(f"/jobs/{job_id}/predict", json=BODY)
    assert_problem(answer, 504, "no_answer")
    assert time.monotonic() - began >= SECONDS
    assert "within 0.3 s (MASKMERGE_PREDICT_SECONDS): it needs a worker; none is alive" in answer.json()["detail"]
    assert [name for name in redis.scan_iter("*") if "prediction" in name and not name.startswith("rq:queues")] == []
    store.workers.beat("w", 60)
    assert "they are at work" in api.post(f"/jobs/{job_id}/predict", json=BODY).json()["detail"]


def test_the_worker_s_outcome_is_the_answer(api: TestClient, store: JobStore, redis: Redis) -> None:
    job_id = merge(api, store)

    def answered(**error: object) -> Answer:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(api.post, f"/jobs/{job_id}/predict", json=BODY)
            [name] = wait_until(lambda: redis.lrange(f"rq:queue:{PREFIX}-predictions", 0, -1), "the order")
            order = store.predictions.take(name)
            assert order is not None
            assert (order.job, order.merged, order.request.rows) == (job_id, "model", BODY["rows"])
            assert store.predictions.take(name) is None, "each order is one worker's"
            outcome = PredictionOutcome(error=JobError.model_validate({"message": "no", **error}))
            store.predictions.answer(name, outcome, 5)
            return answer.result()

    outcomes: list[tuple[dict[str, Any], int, str, str | None]] = [
        ({"code": "invalid_dataset", "detail": {"row": 1}}, 422, "invalid_dataset", "rows.0"),
        ({"code": "invalid_request", "detail": {"field": "model", "available": False}}, 422, "not_available", "model"),
        ({"code": "invalid_checkpoint"}, 422, "invalid_checkpoint", None),
        ({"code": "storage_error"}, 503, "storage_unavailable", None),
        ({"code": "out_of_memory"}, 500, "prediction_failed", None),
        ({"code": "timeout"}, 504, "no_answer", None),
    ]
    for error, status, code, field in outcomes:
        response = answered(**error)
        assert_problem(response, status, code)
        assert [one["field"] for one in response.json()["errors"]] == ([field] if field else [])


def test_only_merges_that_have_succeeded_are_tried(api: TestClient, store: JobStore) -> None:
    waiting = store.records.create(NewJob({"models": []}, "waits")).job_id
    assert_problem(api.post(f"/jobs/{waiting}/predict", json=BODY), 409, "conflict")
    assert store.records.cancel(waiting)
    scores = store.records.create(NewJob({"models": []}, "scores", kind=JobKind.SCORES)).job_id
    answer = api.post(f"/jobs/{scores}/predict", json=BODY)
    assert_problem(answer, 409, "conflict")
    assert "is one of scores" in answer.json()["detail"]


def test_so_many_wait_and_no_more(api: TestClient, store: JobStore, redis: Redis) -> None:
    job_id = merge(api, store)
    redis.rpush(f"rq:queue:{PREFIX}-predictions", *map(str, range(MOST_WAITING)))
    answer = api.post(f"/jobs/{job_id}/predict", json=BODY)
    assert_problem(answer, 503, "too_busy")
    assert answer.headers["Retry-After"]


def test_merges_are_tried_by_who_may_write_in_their_tenant(api: TestClient, store: JobStore, redis: Redis) -> None:
    job_id = merge(api, store, "search")
    keys = ApiKeys(redis, PREFIX)

    def asked(tenant: str, scope: Scope) -> int:
        key = keys.create(NewKey(tenant=tenant, scopes=[scope]))
        headers = {"Authorization": f"Bearer {key.key}"}
        return api.post(f"/jobs/{job_id}/predict", json=BODY, headers=headers).status_code

    assert asked("search", Scope.WRITE) == 504
    assert asked("search", Scope.READ) == 403
    assert asked("ads", Scope.ADMIN) == 404
    assert api.post(f"/jobs/{job_id}/predict", json=BODY).status_code == 401


def test_an_engine_that_is_too_slow_is_given_up_and_its_end_is_told(
    redis: Redis, redis_url: str, store: JobStore, tiny_inputs: Path, tmp_path: Path
) -> None:
    """The order has a deadline of its own, and the engine process stands still."""
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path, queue=PREFIX, local_roots=(tiny_inputs,))
    artifacts = FolderStore(tmp_path)
    artifacts.prepare()
    models = [{"name": name, "checkpoint": f"local:checkpoints/{name}"} for name in ("a", "b")]
    request = MergeRequest.model_validate({"method": {"name": "average"}, "models": models}).model_dump(mode="json")
    job_id = store.records.create(NewJob(request, "merge")).job_id
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    folder = artifacts.begin(attempt)
    shutil.copytree(tiny_inputs / "checkpoints" / "a", folder / "model")
    (folder / "manifest.json").write_text('{"files": []}')
    assert store.tasks.succeed(attempt, RESULT, artifacts.publish(attempt))
    storage = Storage(store, partial(_of_tenant, settings, store, artifacts), artifacts, SearchFolder(tmp_path))
    engine = EngineProcess(1)
    predictor = Predictor(storage, engine, lambda: True, lambda: False)

    def outcome(seconds: float) -> PredictionOutcome:
        asked = PredictionRequest(model="a", rows=["a text"])
        deadline = store.clock() + int(1000 * seconds)
        order = PredictionOrder(job=job_id, merged="model", request=asked, deadline_ms=deadline, request_id=None)
        name = store.predictions.put(order, 60)
        predictor.run(name)
        [text] = redis.lrange(store.predictions.outcome_key(name), 0, -1)
        return PredictionOutcome.model_validate_json(text)

    engine.start()
    try:
        psutil.Process(engine.pid).suspend()
        late = outcome(1).error
        assert late is not None
        assert (late.code, late.retryable) == (ErrorCode.TIMEOUT, True)
        assert not engine.is_well()
        after = outcome(60).error
        assert after is not None
        assert after.message == "the engine process ended while it answered; ask again"
    finally:
        engine.kill()
    record = store.records.get(job_id)
    assert record is not None
    assert (record.attempt, record.status) == (1, Status.SUCCEEDED)
