"""What a tenant may take: each limit with its code and message, on a real Redis."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import NewKey, Scope
from app.contracts.jobs import Attempt, ErrorCode, JobError, PhaseName, Progress
from app.contracts.limits import Limits, NoRoom, QueueFull, StorageFull, TenantLimits
from app.contracts.settings import Settings
from app.main import create_app
from app.services.limits import Room
from app.storage.api_keys import ApiKeys
from app.storage.artifacts import open_artifacts
from app.storage.jobs import JobStore
from app.storage.records import Deleted, NewJob
from app.storage.statistics.folder import StatisticsFolders
from app.storage.tenants import statistics_of
from tests.conftest import BASE_URL, HERE, RESULT, Answer, assert_problem, tiny_recipe

RECIPE = tiny_recipe("a", "b", name="average")
FAILURE = JobError(code=ErrorCode.INTERNAL, message="broken")
PREFIX = "limits"
NewApi = Callable[..., TestClient]


@pytest.fixture
def new_api(redis: Redis, redis_url: str, tmp_path: Path, tiny_inputs: Path) -> Iterator[NewApi]:
    """Makes the API with settings of a test's own; no worker takes its jobs."""
    with ExitStack() as running:

        def make(client: tuple[str, int] = HERE, **settings: Any) -> TestClient:
            common = {"redis_url": SecretStr(redis_url), "data_dir": tmp_path, "queue": PREFIX, "min_free_bytes": 0}
            configured = Settings(**{**common, "local_roots": (tiny_inputs,), **settings})
            return running.enter_context(TestClient(create_app(configured), BASE_URL, client=client))

        yield make


def store_with(redis: Redis, **limits: int) -> JobStore:
    return JobStore(redis, PREFIX, lease_seconds=10, max_losses=3, limits=TenantLimits(Limits(**limits)))


def begun(store: JobStore) -> Attempt:
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    return attempt


# Numbers of jobs


def test_beyond_the_limit_of_waiting_jobs_further_ones_are_refused(new_api: NewApi, redis: Redis) -> None:
    api = new_api(max_queued_jobs=2)
    jobs = [api.post("/merge", json=RECIPE).json()["id"] for _ in range(2)]
    refused = api.post("/merge", json=RECIPE)
    assert_problem(refused, 429, "queue_full")
    assert "2 of the tenant's jobs wait, and 2 may" in refused.json()["detail"]
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.headers["RateLimit-Policy"] == '"queued-jobs";q=2;qu="jobs"'
    assert refused.headers["RateLimit"] == '"queued-jobs";r=0'
    for answer in (api.put("/merge/mine", json=RECIPE), api.post("/scores", json=scores())):
        assert_problem(answer, 429, "queue_full")
    assert api.post("/merge/validate", json=RECIPE).status_code == 200, "it would queue nothing"
    attempt = begun(store_with(redis))
    assert api.post("/merge", json=RECIPE).status_code == 202, "one of them runs, so another may wait"
    assert store_with(redis).tasks.fail(attempt, FAILURE)
    assert_problem(api.post(f"/jobs/{attempt.task.job}/retry"), 429, "queue_full")
    assert api.get(f"/jobs/{attempt.task.job}").json()["status"] == "failed"
    assert api.post(f"/jobs/{jobs[1]}/cancel").status_code == 202
    assert api.post(f"/jobs/{attempt.task.job}/retry").status_code == 202


def scores() -> dict[str, Any]:
    model = {key: value for key, value in RECIPE["models"][0].items() if key != "evaluation"}
    return {"models": [model]}


def test_a_repeated_request_gets_its_job_at_the_limit_too(new_api: NewApi) -> None:
    api = new_api(max_queued_jobs=1)
    first = api.post("/merge", json=RECIPE, headers={"Idempotency-Key": "one"}).json()["id"]
    again = api.post("/merge", json=RECIPE, headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["id"]) == (202, first)


def test_of_many_who_submit_at_once_at_the_limit_exactly_one_passes(redis_url: str, redis: Redis) -> None:
    threads = 8
    start = Barrier(threads)

    def submit(_: int) -> bool:
        with Redis.from_url(redis_url, decode_responses=True) as own:
            store = store_with(own, queued_jobs=5)
            start.wait()
            try:
                store.records.create(NewJob({}, "name"))
            except QueueFull as full:
                return (full.limit, full.used) != (5, 5)
            return True

    for _ in range(4):
        store_with(redis).records.create(NewJob({}, "name"))
    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(submit, range(threads))) == 1
    assert redis.zcard(f"{PREFIX}:waiting:default") == 5


def test_a_tenant_may_have_limits_of_its_own(new_api: NewApi, redis: Redis) -> None:
    own = {"small": {"queued_jobs": 1, "priority": -1, "body_bytes": 1024}, "free": {"queued_jobs": None}}
    api = new_api(max_queued_jobs=2, tenant_limits=json.dumps(own))
    keys = {
        tenant: {"Authorization": f"Bearer {ApiKeys(redis, PREFIX).create(NewKey(tenant=tenant)).key}"}
        for tenant in ("small", "free", "any")
    }
    low = {**RECIPE, "priority": -1}
    for tenant, most in (("small", 1), ("any", 2)):
        answers = [api.post("/scores", json={**scores(), "priority": -1}, headers=keys[tenant]) for _ in range(most)]
        assert {answer.status_code for answer in answers} == {202}
        assert_problem(api.post("/scores", json={**scores(), "priority": -1}, headers=keys[tenant]), 429, "queue_full")
    assert {api.post("/merge", json=low, headers=keys["free"]).status_code for _ in range(3)} == {202}
    high = api.post("/scores", json=scores(), headers=keys["small"])
    large = api.post("/merge", content=" " * 1025, headers={**keys["small"], "Content-Type": "application/json"})
    assert_problem(large, 413, "too_large")
    assert "more than 1024 bytes" in large.json()["detail"]
    assert high.status_code == 429, "the queue is looked at first"


def test_a_priority_beyond_the_tenants_is_refused_by_its_field(new_api: NewApi) -> None:
    api = new_api(max_priority=3)
    for path in ("/merge", "/merge/validate"):
        refused = api.post(path, json={**RECIPE, "priority": 4})
        assert_problem(refused, 422, "invalid_request")
        message = "is 4, and the tenant may ask for at most 3"
        assert refused.json()["errors"] == [{"field": "priority", "message": message}]
    job = api.post("/merge", json={**RECIPE, "priority": 3}).json()
    assert (job["priority"], job["request"]["priority"]) == (3, 3)
    assert [one["priority"] for one in api.get("/jobs").json()["data"]] == [3]
    assert_problem(api.post("/merge", json={**RECIPE, "priority": 11}), 422, "invalid_request")


# Bytes


def test_stored_bytes_count_artifacts_and_what_jobs_are_going_to_write(redis: Redis) -> None:
    store = store_with(redis, stored_bytes=1000)
    jobs = [store.records.create(NewJob({}, "name", bytes_to_write=400, priority=n)).job_id for n in (2, 1)]
    with pytest.raises(StorageFull, match=r"take 800 bytes.* would add 201, and 1000 are allowed"):
        store.records.create(NewJob({}, "name", bytes_to_write=201))
    store.records.create(NewJob({}, "name", tenant="another", bytes_to_write=1000))
    assert store.tasks.succeed(begun(store), RESULT, "folder", artifact_bytes=300)
    assert (store.usage.of("default"), store.usage.reserved()) == (700, 1400)
    with pytest.raises(StorageFull, match="take 1000 bytes"):
        store.records.create(NewJob({}, "name", bytes_to_write=1), uploaded=300)
    assert store.records.cancel(jobs[1])
    assert (store.usage.of("default"), store.usage.reserved()) == (300, 1000)
    with pytest.raises(StorageFull):
        store.records.retry(jobs[1], uploaded=400)
    assert store.records.delete(jobs[0]) is Deleted.DONE
    assert store.usage.of("default") == 0
    assert store.records.retry(jobs[1], uploaded=400)


@pytest.mark.parametrize("end", ["failed", "cancelled", "lost", "timed out", "cancelled while it waits"])
def test_whatever_ends_a_job_gives_back_what_was_kept_for_it(redis: Redis, end: str) -> None:
    now = [1_800_000_000_000]
    store = JobStore(redis, PREFIX, lease_seconds=10, max_losses=2, clock=lambda: now[0])
    job = store.records.create(NewJob({}, "name", bytes_to_write=500, deadline_seconds=10)).job_id
    assert store.usage.reserved() == 500
    if end == "cancelled while it waits":
        store.records.cancel(job)
    else:
        attempt = begun(store)
        assert store.tasks.release(attempt, lost=True)
        assert store.usage.reserved() == 500
        attempt = begun(store)
        if end == "failed":
            assert store.tasks.fail(attempt, FAILURE)
        elif end == "cancelled":
            store.records.cancel(job)
            assert store.tasks.acknowledge_cancel(attempt)
        elif end == "lost":
            assert store.tasks.release(attempt, lost=True)
        else:
            now[0] += 11_000
            assert store.records.time_out() == 1
    assert store.usage.reserved() == 0
    assert store.records.retry(job)
    assert store.usage.reserved() == 500


def test_a_merge_that_the_tenant_has_no_room_for_is_refused(new_api: NewApi) -> None:
    api = new_api(max_stored_bytes=10_000)
    refused = api.post("/merge", json=RECIPE)
    assert_problem(refused, 413, "storage_full")
    for words in ("take 0 bytes", "10000 are allowed", "delete jobs"):
        assert words in refused.json()["detail"]
    assert api.get("/jobs").json()["data"] == []


def test_uploads_count_as_stored_too(new_api: NewApi, redis: Redis) -> None:
    plan = new_api().post("/merge/validate", json=RECIPE).json()
    api = new_api(max_stored_bytes=plan["bytes_to_write"] + 10_000)

    def upload(number: int) -> Answer:
        content = b'{"text": "a row", "label": %d}\n' % number * 250
        return api.put(
            f"/uploads/{hashlib.sha256(content).hexdigest()}",
            params={"name": "rows.jsonl"},
            content=content,
            headers={"Content-Type": "application/octet-stream"},
        )

    assert upload(1).status_code == 201
    job = api.post("/merge", json=RECIPE).json()["id"]
    assert_problem(upload(2), 413, "storage_full")
    assert upload(1).status_code == 200, "what is there already takes no more"
    assert api.post(f"/jobs/{job}/cancel").status_code == 202
    assert upload(2).status_code == 201
    for refused in (api.post(f"/jobs/{job}/retry"), api.post("/merge", json=RECIPE)):
        assert_problem(refused, 413, "storage_full")
        assert "delete jobs and uploads" in refused.json()["detail"]


def test_a_disk_that_would_fill_up_refuses_at_the_door_with_what_waiting_jobs_will_write(
    new_api: NewApi, redis: Redis, tmp_path: Path
) -> None:
    free = open_artifacts("folder", tmp_path)
    free.prepare()
    roomy = new_api(max_upload_bytes=2**60)
    bytes_to_write = roomy.post("/merge/validate", json=RECIPE).json()["bytes_to_write"]
    kept = free.free_bytes() - 100 * 2**20  # other programs write meanwhile
    assert kept > 0
    api = new_api(min_free_bytes=kept)
    store = store_with(redis)
    assert api.post("/merge", json=RECIPE).status_code == 202
    waiting = store.records.create(NewJob({}, "name", bytes_to_write=2**50)).job_id
    for path in ("/merge", "/merge/validate"):
        refused = api.post(path, json=RECIPE)
        assert_problem(refused, 507, "no_space")
        for words in (f"takes {bytes_to_write} bytes", "waiting and running jobs need", "MASKMERGE_MIN_FREE_BYTES"):
            assert words in refused.json()["detail"]
    assert_problem(api.post("/scores", json=scores()), 507, "no_space")
    store.records.cancel(waiting)
    assert_problem(api.post(f"/jobs/{waiting}/retry"), 507, "no_space")
    assert api.post("/merge", json=RECIPE).status_code == 202
    upload, size = f"/uploads/{'0' * 64}", free.free_bytes() // 2
    header, params = {"Content-Range": f"bytes */{size}"}, {"name": "model.safetensors"}
    assert roomy.put(upload, params=params, headers=header).status_code == 202
    assert_problem(api.post("/merge", json=RECIPE), 507, "no_space")  # what is announced is left to the upload
    assert roomy.delete(upload).status_code == 204
    assert api.post("/merge/validate", json=RECIPE).status_code == 200


def test_a_job_and_an_upload_are_not_both_taken_for_the_last_room(
    new_api: NewApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, size = Room.uploaded, 10**6
    with ThreadPoolExecutor(1) as other:
        limited = new_api(max_stored_bytes=size)
        asked, statuses = Event(), list[Future[int]]()

        def uploaded(room: Room, tenant: str) -> int:
            """An upload is announced just after what there is was counted for the job."""
            found = free(room, tenant)
            if not asked.is_set():
                asked.set()
                statuses.append(other.submit(announced))
                wait(statuses, timeout=0.5)
            return found

        def announced() -> int:
            header, params = {"Content-Range": f"bytes */{size}"}, {"name": "model.safetensors"}
            return limited.put(f"/uploads/{'0' * 64}", params=params, headers=header).status_code

        monkeypatch.setattr(Room, "uploaded", uploaded)
        assert limited.post("/merge", json=RECIPE).status_code == 202
        assert statuses[0].result(30) == 413


def test_the_room_is_decided_where_the_job_is_made(redis: Redis) -> None:
    store = store_with(redis)
    store.records.create(NewJob({}, "name", bytes_to_write=60), room=100)
    with pytest.raises(NoRoom, match="takes 41 bytes, and the data folder has room for 40"):
        store.records.create(NewJob({}, "name", bytes_to_write=41), room=100)
    store.records.create(NewJob({}, "name", bytes_to_write=40), room=100)


def test_what_a_running_job_has_written_is_not_counted_twice(tmp_path: Path, redis: Redis) -> None:
    artifacts = open_artifacts("folder", tmp_path)
    artifacts.prepare()
    store = store_with(redis)
    store.records.create(NewJob({}, "name"))
    folder = artifacts.begin(begun(store))
    (folder / "weights").write_bytes(os.urandom(100_000))
    (folder / "model").mkdir()
    (folder / "model" / "weights").hardlink_to(folder / "weights")
    assert 100_000 <= artifacts.assembled_bytes() < 120_000


def test_statistics_make_room_the_oldest_first_and_only_where_that_is_enough(tmp_path: Path) -> None:
    folders = [statistics_of(tmp_path, tenant) for tenant in ("default", "another")]
    for folder in folders:
        folder.mkdir(parents=True)

    def keep(number: int, used_at: int) -> Path:
        entry = folders[0] / f"{number:064x}"
        entry.mkdir()
        (entry / "a.safetensors").write_bytes(os.urandom(100_000))
        os.utime(entry, (used_at, used_at))
        return entry

    oldest, newest, middle = keep(1, 1000), keep(2, 3000), keep(3, 2000)
    linked = folders[1] / oldest.name
    linked.mkdir()
    (linked / "a.safetensors").hardlink_to(oldest / "a.safetensors")
    os.utime(linked, (1000, 1000))
    statistics = StatisticsFolders(tmp_path)
    assert not statistics.make_room(400_000)
    assert all(entry.exists() for entry in (oldest, newest, middle, linked))
    with (oldest / "a.safetensors").open("rb") as reading:
        assert statistics.make_room(150_000)
        assert [entry.exists() for entry in (oldest, linked, middle, newest)] == [False, False, False, True]
        assert len(reading.read()) == 100_000, "who reads one goes on"
    assert [path.name for folder in folders for path in folder.iterdir()] == [newest.name]


# Requests


def test_a_tenant_sends_so_many_requests_and_every_answer_says_how_many_are_left(new_api: NewApi, redis: Redis) -> None:
    api = new_api(max_requests_per_minute=3)
    keys = [ApiKeys(redis, PREFIX).create(NewKey(tenant=tenant)).key for tenant in ("one", "one", "two")]
    first, second, other = [{"Authorization": f"Bearer {key}"} for key in keys]
    for left, headers in ((2, first), (1, second), (0, first)):
        answer = api.get("/jobs", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["RateLimit-Policy"] == '"requests";q=3;w=60'
        assert answer.headers["RateLimit"].startswith(f'"requests";r={left};t=')
    refused = api.post("/merge", json=RECIPE, headers=second)
    assert_problem(refused, 429, "rate_limited")
    assert "may send 3 requests a minute" in refused.json()["detail"]
    assert 15 <= int(refused.headers["Retry-After"]) <= 20, "one is allowed whenever its third of a minute is over"
    assert refused.headers["RateLimit"] == f'"requests";r=0;t={refused.headers["Retry-After"]}'
    assert api.get("/jobs", headers=other).status_code == 200
    for path in ("/healthz", "/methods", "/openapi.json"):
        answer = api.get(path, headers=second)
        assert (answer.status_code, "RateLimit" in answer.headers) == (200, False)
    assert api.get("/readyz").json()["code"] == "not_ready", "there is no worker, and it may be asked"


def test_without_a_limit_no_answer_speaks_of_one(new_api: NewApi) -> None:
    assert "RateLimit" not in new_api().get("/jobs").headers


def test_requests_that_a_key_does_not_allow_count_too(new_api: NewApi, redis: Redis) -> None:
    api = new_api(max_requests_per_minute=1)
    key = ApiKeys(redis, PREFIX).create(NewKey(tenant="one", scopes=[Scope.READ])).key
    headers = {"Authorization": f"Bearer {key}"}
    assert_problem(api.post("/merge", json=RECIPE, headers=headers), 403, "insufficient_scope")
    assert_problem(api.post("/merge", json=RECIPE, headers=headers), 429, "rate_limited")


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"),
    ],
)
def test_an_address_sends_so_many_requests_without_a_valid_key_and_valid_ones_pass(
    new_api: NewApi, redis: Redis, address: str, same: str, other: str
) -> None:
    key = {"Authorization": f"Bearer {ApiKeys(redis, PREFIX).create(NewKey()).key}"}
    wrong = {"Authorization": f"Bearer mm_{'0' * 16}_{'a' * 43}"}

    def ask(client: str, headers: dict[str, str]) -> Answer:
        return new_api(client=(client, 1), max_failed_keys_per_minute=2).get("/jobs", headers=headers)

    assert_problem(ask(address, wrong), 401, "unauthenticated")
    assert_problem(ask(address, {}), 401, "unauthenticated")
    refused = ask(same, wrong)
    assert_problem(refused, 429, "rate_limited")
    assert "2 requests without a valid API key" in refused.json()["detail"]
    assert refused.headers["RateLimit-Policy"] == '"failed-keys";q=2;w=60'
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert_problem(ask(other, wrong), 401, "unauthenticated")
    assert ask(address, key).status_code == 200


def test_polls_hear_when_to_ask_again_while_the_job_goes_on(new_api: NewApi, redis: Redis) -> None:
    api = new_api()
    store = store_with(redis)
    job = api.post("/merge", json=RECIPE).json()["id"]
    waiting = api.get(f"/jobs/{job}")
    assert 1 <= int(waiting.headers["Retry-After"]) <= 3
    attempt = begun(store)

    def shown(eta: float | None) -> int:
        store.tasks.renew(attempt, Progress(phase=PhaseName.MERGING, done=1, total=2, fraction=0.5, eta_seconds=eta))
        return int(api.get(f"/jobs/{job}").headers["Retry-After"])

    assert [shown(eta) for eta in (0.2, 12.3, 4000.0)] == [1, 13, 60]
    assert 1 <= shown(None) <= 3
    answer = api.get(f"/jobs/{job}")
    unchanged = api.get(f"/jobs/{job}", headers={"If-None-Match": answer.headers["ETag"]})
    assert (unchanged.status_code, unchanged.headers["Retry-After"]) == (304, answer.headers["Retry-After"])
    redis.hset(f"{PREFIX}:job:{job}", "started_ms", 1)
    assert api.get(f"/jobs/{job}").headers["Retry-After"] == "60", "what has taken long will take longer"
    assert store.tasks.succeed(attempt, RESULT, "folder")
    assert "Retry-After" not in api.get(f"/jobs/{job}").headers
