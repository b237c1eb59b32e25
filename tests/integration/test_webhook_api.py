"""Webhooks over HTTP and on the command line, and a process that delivers and is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis
from standardwebhooks import Webhook as Verifier

from app.cli import main
from app.contracts.api_keys import NewKey, Scope
from app.contracts.settings import Settings
from app.contracts.webhooks import DeliveryState
from app.main import create_app
from app.storage.api_keys import ApiKeys
from app.storage.jobs import JobStore
from app.storage.signing_secrets import SigningSecrets
from tests.conftest import BASE_URL, HERE, REPOSITORY, assert_problem, free_port, tiny_recipe, wait_until
from tests.integration.test_webhooks import SIGNER, new_job
from tests.receivers import Handler, answering, receiving, stalling

PREFIX, STRICT = "hooked", "hooked-strict"


@pytest.fixture(scope="module")
def settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Settings:
    data_dir = tmp_path_factory.mktemp("data")
    return Settings(redis_url=SecretStr(redis_url), data_dir=data_dir, queue=PREFIX, local_roots=(tiny_inputs,))


@pytest.fixture(scope="module")
def strict(settings: Settings) -> Iterator[TestClient]:
    """An API that sends webhooks to public addresses alone. It has keys of its own in Redis, and so jobs of its own."""
    own = settings.model_copy(update={"key_prefix": STRICT})
    with TestClient(create_app(own), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[TestClient]:
    """An API that sends webhooks to this machine too."""
    open_to_all = settings.model_copy(update={"webhook_allow_private": True})
    with TestClient(create_app(open_to_all), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, PREFIX, 10, 3)


@pytest.fixture
def bearer(redis: Redis) -> Callable[..., dict[str, str]]:
    def made(scope: str = "write", **more: Any) -> dict[str, str]:
        key = ApiKeys(redis, PREFIX).create(NewKey.model_validate({"scopes": [Scope(scope)], **more}))
        return {"Authorization": f"Bearer {key.key}"}

    return made


def told(url: str, *events: str) -> dict[str, Any]:
    return {**tiny_recipe("a", "b"), "webhook": {"url": url, "events": list(events) or ["job.cancelled"]}}


def test_a_job_is_accepted_with_a_webhook_and_told_of(api: TestClient, redis: Redis) -> None:
    made = api.post("/webhooks/secret", json={})
    assert made.status_code == 201, made.text
    assert made.headers["Cache-Control"] == "no-store"
    assert (made.json()["signer"], made.json()["former_until"]) == ("default", None)
    with receiving() as receiver:
        job = api.post("/merge", json=told(receiver.url))
        assert job.status_code == 202, job.text
        assert job.json()["request"]["webhook"] == {"url": receiver.url, "events": ["job.cancelled"]}
        job_id = job.json()["id"]
        assert api.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        path = f"/jobs/{job_id}/deliveries"
        wait_until(lambda: api.get(path).json()["data"][0]["state"] == "delivered", "the delivery")
        log = api.get(path).json()
        assert log["disabled_at"] is None
        [delivery] = log["data"]
        assert delivery["id"] == f"msg_{job_id}_1"
        assert (delivery["n"], delivery["event"], delivery["next_attempt_at"]) == (1, "job.cancelled", None)
        [attempt] = delivery["attempts"]
        assert (attempt["status"], attempt["error"]) == (204, None)
        again = api.post(f"{path}/1/redeliver")
        assert again.status_code == 202
        wait_until(lambda: len(receiver.received) == 2, "the redelivery")
        assert_problem(api.post(f"{path}/2/redeliver"), 404, "not_found")
        for n in ("0", "01", "-1", "1.0", "9999999999", "x"):
            assert_problem(api.post(f"{path}/{n}/redeliver"), 404, "not_found")
        for received in receiver.received:
            message = Verifier(made.json()["secret"]).verify(received.body, received.headers)
            assert message["data"]["id"] == job_id
    scores = api.post("/scores", json={"models": [without_evaluation()], "webhook": told(receiver.url)["webhook"]})
    assert scores.status_code == 202, scores.text


def without_evaluation() -> dict[str, Any]:
    model: dict[str, Any] = tiny_recipe("a")["models"][0]
    return {name: value for name, value in model.items() if name != "evaluation"}


def test_a_webhook_needs_a_secret_first(api: TestClient, redis: Redis) -> None:
    for path in ("/merge", "/merge/validate"):
        response = api.post(path, json=told("https://example.org/"))
        assert_problem(response, 422, "invalid_request")
        assert [error["field"] for error in response.json()["errors"]] == ["webhook"]
        assert "POST /webhooks/secret" in response.json()["detail"]
    assert_problem(api.post("/webhooks/test", json={"url": "https://example.org/"}), 409, "conflict")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost:8000/", "http://[::1]/", "http://169.254.169.254/", "http://2130706433/"],
)
def test_an_address_that_is_not_public_is_refused_at_the_door(strict: TestClient, redis: Redis, url: str) -> None:
    strict.post("/webhooks/secret", json={})
    for path in ("/merge", "/merge/validate"):
        response = strict.post(path, json=told(url))
        assert_problem(response, 422, "invalid_request")
        assert [error["field"] for error in response.json()["errors"]] == ["webhook.url"]
        assert "MASKMERGE_WEBHOOK_ALLOW_PRIVATE" in response.json()["detail"]
    response = strict.put("/merge/mine", json=told(url))
    assert_problem(response, 422, "invalid_request")
    response = strict.post("/webhooks/test", json={"url": url})
    assert_problem(response, 422, "invalid_request")
    assert [error["field"] for error in response.json()["errors"]] == ["url"]


@pytest.mark.parametrize("url", ["ftp://example.org/", "https://user:pw@example.org/", "https://example.org/#a", 5])
def test_what_is_no_url_of_a_webhook_is_refused_by_its_field(api: TestClient, redis: Redis, url: object) -> None:
    response = api.post("/merge", json={**tiny_recipe("a", "b"), "webhook": {"url": url}})
    assert_problem(response, 422, "invalid_request")
    assert [error["field"] for error in response.json()["errors"]] == ["webhook.url"]


def test_the_address_is_checked_at_every_delivery_whatever_was_accepted(strict: TestClient, redis: Redis) -> None:
    SigningSecrets(redis, STRICT).rotate(SIGNER, 0)
    store = JobStore(redis, STRICT, 10, 3)

    def attempted(path: str) -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = strict.get(path).json()["data"]
        return found if found[0]["attempts"] else None

    with receiving() as receiver:
        for host in ("localhost", "127.0.0.1"):
            task = new_job(store, f"http://{host}:{receiver.port}/", "job.cancelled")
            store.records.cancel(task.job)
            path = f"/jobs/{task.job}/deliveries"
            [delivery] = wait_until(partial(attempted, path), "the attempt")
            assert "public addresses alone" in delivery["attempts"][0]["error"]
            assert delivery["state"] == "pending"
        assert receiver.received == []


def test_each_key_has_its_own_secret(
    api: TestClient, redis: Redis, store: JobStore, bearer: Callable[..., dict[str, str]]
) -> None:
    mine, other = bearer(), bearer()
    first = api.post("/webhooks/secret", json={}, headers=mine).json()
    second = api.post("/webhooks/secret", json={"overlap_seconds": 60}, headers=mine).json()
    assert first["signer"] == second["signer"] == mine["Authorization"].removeprefix("Bearer mm_")[:16]
    assert second["former_until"] is not None
    assert_problem(api.post("/merge", json=told("https://example.org/"), headers=other), 422, "invalid_request")
    with receiving() as receiver:
        job_id = api.post("/merge", json=told(receiver.url), headers=mine).json()["id"]
        store.records.cancel(job_id)
        wait_until(lambda: receiver.received, "the delivery")
        for secret in (first["secret"], second["secret"]):
            assert Verifier(secret).verify(receiver.received[0].body, receiver.received[0].headers)


def test_scopes_and_tenants(
    api: TestClient, redis: Redis, store: JobStore, bearer: Callable[..., dict[str, str]]
) -> None:
    task = new_job(store, "https://example.org/", "job.cancelled", tenant="search")
    reader, writer = bearer("read", tenant="search"), bearer("write", tenant="search")
    path = f"/jobs/{task.job}/deliveries"
    assert api.get(path, headers=reader).json() == {"data": [], "disabled_at": None}
    for method, route, body in (
        ("POST", f"{path}/1/redeliver", None),
        ("POST", "/webhooks/secret", {}),
        ("POST", "/webhooks/test", {"url": "https://example.org/"}),
    ):
        assert_problem(api.request(method, route, json=body, headers=reader), 403, "insufficient_scope")
    assert_problem(api.post(f"{path}/1/redeliver", headers=writer), 404, "not_found")
    stranger = bearer("admin", tenant="other")
    assert_problem(api.get(path, headers=stranger), 404, "not_found")
    assert_problem(api.post(f"{path}/1/redeliver", headers=stranger), 404, "not_found")


def test_a_receiver_can_be_tried_out(api: TestClient, redis: Redis) -> None:
    secret = api.post("/webhooks/secret", json={}).json()["secret"]
    with receiving(answering(200), answering(500)) as receiver:
        good, bad = (api.post("/webhooks/test", json={"url": receiver.url}).json() for _ in range(2))
        [first, _] = receiver.received
    assert (good["delivered"], good["status"], good["error"]) == (True, 200, None)
    assert (bad["delivered"], bad["status"]) == (False, 500)
    assert "answered 500" in bad["error"]
    message = Verifier(secret).verify(first.body, first.headers)
    assert (message["type"], message["data"]) == ("webhook.test", {})
    assert first.headers["webhook-id"] == good["id"] != bad["id"]
    unreachable = api.post("/webhooks/test", json={"url": f"http://127.0.0.1:{free_port()}/"}).json()
    assert (unreachable["delivered"], unreachable["status"]) == (False, None)


def test_too_many_secrets_are_a_conflict(api: TestClient, redis: Redis) -> None:
    answers = [api.post("/webhooks/secret", json={}) for _ in range(6)]
    assert [answer.status_code for answer in answers[:5]] == [201] * 5
    assert_problem(answers[5], 409, "conflict")
    assert api.post("/webhooks/secret", json={"overlap_seconds": 0}).status_code == 201


def test_secrets_are_made_on_the_command_line(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = SigningSecrets(redis, PREFIX)
    key = ApiKeys(redis, PREFIX).create(NewKey())
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["keys", "secret", *words])
        output, errors = capsys.readouterr()
        return status, output.strip(), errors

    status, secret, errors = run(key.id)
    assert (status, secrets.active(key.id)) == (0, [secret])
    assert key.id in errors
    assert secret not in errors
    status, newer, errors = run(key.prefix, "--overlap", "2h")
    assert (status, secrets.active(key.id)) == (0, [newer, secret])
    assert "former one signs too until" in errors
    status, own, _ = run()
    assert (status, secrets.active("default")) == (0, [own])
    assert run("0" * 16)[0] == 1
    for overlap in ("soon", "31d"):
        status, _, errors = run("--overlap", overlap)
        assert status == 2
        assert "overlap" in errors


def environment(settings: Settings) -> dict[str, str]:
    assert settings.redis_url is not None
    return {
        "MASKMERGE_REDIS_URL": settings.redis_url.get_secret_value(),
        "MASKMERGE_DATA_DIR": str(settings.data_dir),
        "MASKMERGE_QUEUE": PREFIX,
        "MASKMERGE_WEBHOOK_ALLOW_PRIVATE": "true",
        "MASKMERGE_WEBHOOK_SECONDS": "0.5",
    }


@contextmanager
def delivering_process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """`maskmerge api`, which is killed in the end if it still runs."""
    command = [sys.executable, "-m", "app.cli", "api", "--port", str(free_port())]
    variables = {**os.environ, **environment(settings)}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_nothing_is_lost_when_the_process_that_delivers_is_killed(
    settings: Settings, redis: Redis, store: JobStore
) -> None:
    """It is killed in the middle of attempts, and jobs end before and after; every job is told of in the end."""
    SigningSecrets(redis, PREFIX).rotate(SIGNER, 0)
    jobs: list[str] = []

    def end_jobs(url: str) -> None:
        for _ in range(10):
            jobs.append(new_job(store, url, "job.cancelled").job)
            store.records.cancel(jobs[-1])

    def slow(handler: Handler) -> None:
        time.sleep(0.1)
        answering(204)(handler)

    with receiving(slow, slow, slow, slow, stalling, stalling, slow) as receiver:
        end_jobs(receiver.url)
        with delivering_process(settings) as process:
            wait_until(lambda: len(receiver.received) >= 6, "attempts under way", interval_s=0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        end_jobs(receiver.url)
        logs = [store.deliveries.log(job).data[0] for job in jobs]
        assert {log.state for log in logs} == {DeliveryState.PENDING, DeliveryState.DELIVERED}
        with delivering_process(settings) as process:

            def all_are_told() -> bool:
                return all(store.deliveries.log(job).data[0].state is DeliveryState.DELIVERED for job in jobs)

            wait_until(all_are_told, "every delivery")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert {received.headers["webhook-id"] for received in receiver.received} == {f"msg_{job}_1" for job in jobs}
