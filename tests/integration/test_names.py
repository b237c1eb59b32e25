"""Jobs that are put under a name of the caller's own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import NewKey
from app.contracts.jobs import Attempt, ErrorCode, JobError, Stage, TaskId
from app.contracts.settings import Settings
from app.main import create_app
from app.storage.api_keys import ApiKeys
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from tests.conftest import BASE_URL, HERE, assert_problem, tiny_recipe


@pytest.fixture(scope="module")
def app_of_module(redis_url: str, tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("names")
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=folder, queue="names", local_roots=(tiny_inputs,))
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture
def api(app_of_module: TestClient, redis: Redis) -> TestClient:
    """The API, with an empty Redis."""
    return app_of_module


RECIPE = tiny_recipe("a", "b", name="average")
OTHER = tiny_recipe("a", "b", name="linear")


def test_a_repeated_put_is_the_same_job_and_another_recipe_is_refused(api: TestClient) -> None:
    first = api.put("/merge/nightly.2026-11-30", json=RECIPE)
    assert (first.status_code, first.json()["key"]) == (202, "nightly.2026-11-30")
    again = api.put("/merge/nightly.2026-11-30", json=RECIPE)
    assert again.status_code == 200
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"] == f"/jobs/{first.json()['id']}"
    other = api.put("/merge/nightly.2026-11-30", json=OTHER)
    assert_problem(other, 409, "conflict")
    assert first.json()["id"] in other.json()["detail"]
    assert [(job["id"], job["key"]) for job in api.get("/jobs").json()["data"]] == [
        (first.json()["id"], "nightly.2026-11-30")
    ]
    posted = api.post("/merge", json=RECIPE, headers={"Idempotency-Key": "nightly.2026-11-30"}).json()
    assert (posted["key"], posted["id"] == first.json()["id"]) == (None, False), "an Idempotency-Key is no name"


def test_a_name_is_free_when_its_job_is_deleted_and_is_kept_for_as_long_as_it_is_there(
    api: TestClient, redis: Redis
) -> None:
    job = api.put("/merge/mine", json=RECIPE).json()["id"]
    assert [redis.ttl(name) for name in redis.scan_iter("names:named:*")] == [-1]
    assert api.post(f"/jobs/{job}/cancel").status_code == 202
    assert api.put("/merge/mine", json=RECIPE).json()["status"] == "cancelled"
    assert api.delete(f"/jobs/{job}").status_code == 204
    assert list(redis.scan_iter("names:named:*")) == []
    made = api.put("/merge/mine", json=OTHER)
    assert made.status_code == 202
    assert made.json()["id"] != job


@pytest.fixture
def eager_worker(api: TestClient, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    """A worker that has begun every job before waking it returns."""
    store = JobStore(redis, "names", lease_seconds=10, max_losses=3)
    monkeypatch.setattr(TaskQueue, "wake", lambda _: store.tasks.claim("worker"))
    return store


def test_an_answer_tells_a_new_job_as_queued_however_soon_a_worker_takes_it(
    api: TestClient, eager_worker: JobStore
) -> None:
    for answer in (api.post("/merge", json=RECIPE), api.put("/merge/mine", json=RECIPE)):
        job = answer.json()
        assert (answer.status_code, job["status"]) == (202, "queued")
        assert api.get(f"/jobs/{job['id']}").json()["status"] == "running"
    again = api.put("/merge/mine", json=RECIPE)
    assert (again.status_code, again.json()["status"]) == (200, "running")
    attempt = Attempt(task=TaskId(job=job["id"], stage=Stage.MERGE), number=1)
    error = JobError(code=ErrorCode.INTERNAL, message="lost", retryable=True)
    assert eager_worker.tasks.fail(attempt, error)
    retried = api.post(f"/jobs/{job['id']}/retry")
    assert (retried.status_code, retried.json()["status"]) == (202, "queued")
    assert api.get(f"/jobs/{job['id']}").json()["status"] == "running"


def test_many_who_put_the_same_at_once_make_one_job(api: TestClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.put("/merge/mine", json=RECIPE), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [202]
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize("name", ["a b", "%2E%2E", ".hidden", "a%2Fb", "", "ä", "x" * 129, "mine%0A"])
def test_names_that_no_job_can_have_are_not_found(api: TestClient, name: str) -> None:
    assert api.put(f"/merge/{name}", json=RECIPE).status_code in (404, 405)
    assert api.get("/jobs").json()["data"] == []


def test_a_refused_recipe_leaves_its_name_free(api: TestClient) -> None:
    wrong = tiny_recipe("a", name="average")
    wrong["models"][0]["checkpoint"] = "local:nothing"
    assert_problem(api.put("/merge/mine", json=wrong), 422, "invalid_request")
    assert api.put("/merge/mine", json=RECIPE).status_code == 202


def test_each_tenant_has_names_of_its_own(api: TestClient, redis: Redis) -> None:
    keys = ApiKeys(redis, "names")
    made = set()
    for tenant in ("one", "two"):
        header = {"Authorization": f"Bearer {keys.create(NewKey(tenant=tenant)).key}"}
        answer = api.put("/merge/mine", json=RECIPE if tenant == "one" else OTHER, headers=header)
        assert answer.status_code == 202
        made.add(answer.json()["id"])
    assert len(made) == 2
