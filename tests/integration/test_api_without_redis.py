"""The API while Redis is away, or hangs: honest answers, soon."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.contracts.settings import Settings
from app.embedded_redis import EmbeddedRedis
from app.main import create_app
from app.storage.connection import HUNG_S
from tests.conftest import BASE_URL, HERE, free_port, keeps_within, tiny_recipe, wait_until


@pytest.fixture
def api(tmp_path: Path, tiny_inputs: Path) -> Iterator[TestClient]:
    settings = Settings(
        redis_url=f"redis://:secret-word@127.0.0.1:{free_port()}", data_dir=tmp_path, local_roots=(tiny_inputs,)
    )
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/jobs", f"/jobs/{'0' * 28}", *(f"/jobs/{'0' * 28}/{part}" for part in ("archive", "events"))]
)
def test_reads_answer_503(api: TestClient, path: str) -> None:
    response = api.get(path)
    assert (response.status_code, response.json()["code"]) == (503, "redis_unavailable")
    assert response.headers["Retry-After"] == "2"
    assert "secret-word" not in response.text


def test_a_merge_is_not_accepted(api: TestClient) -> None:
    response = api.post("/merge", json=tiny_recipe())
    assert (response.status_code, response.json()["code"]) == (503, "redis_unavailable")


def test_the_process_is_alive_but_not_ready(api: TestClient) -> None:
    assert api.get("/healthz").status_code == 200
    response = api.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert "Redis does not answer" in response.json()["detail"]


def test_the_api_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MASKMERGE_REDIS_URL"):
        create_app(Settings(redis_url=None, data_dir=tmp_path))


TOLD_WITHIN_S = 2.0
UNKNOWN, KEY, DIGEST = "0" * 28, "1" * 16, "2" * 64


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[TestClient]:
    """An API whose Redis accepts connections and answers nothing any more."""
    folder = tmp_path_factory.mktemp("hung")
    server = EmbeddedRedis(folder)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    settings = Settings(redis_url=SecretStr(server.url), data_dir=folder, local_roots=(tiny_inputs,))
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        wait_until(lambda: client.get("/jobs").status_code == 200, "Redis to answer")
        os.kill(process.pid, signal.SIGSTOP)
        yield client
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: client.get("/jobs").status_code == 200, "Redis to answer again")
    process.kill()
    process.wait()
    server.clean()


ASKING = [
    ("GET", "/jobs"),
    ("GET", f"/jobs/{UNKNOWN}"),
    ("DELETE", f"/jobs/{UNKNOWN}"),
    *[("POST", f"/jobs/{UNKNOWN}/{action}") for action in ("cancel", "retry", "predict")],
    *[
        ("GET", f"/jobs/{UNKNOWN}/{part}")
        for part in ("events", "artifacts", "artifacts/a", "archive", "report", "log")
    ],
    ("GET", f"/jobs/{UNKNOWN}/deliveries"),
    ("POST", f"/jobs/{UNKNOWN}/deliveries/1/redeliver"),
    ("POST", "/webhooks/secret"),
    ("POST", "/webhooks/test"),
    ("POST", "/merge"),
    ("POST", "/scores"),
    ("PUT", "/merge/mine"),
    ("POST", "/merge/validate"),  # these ask only who calls
    ("GET", "/scores"),
    ("GET", f"/scores/{DIGEST}"),
    ("POST", "/keys"),
    ("GET", "/keys"),
    ("DELETE", f"/keys/{KEY}"),
    *[(method, f"/uploads/{DIGEST}") for method in ("PUT", "GET", "DELETE")],
    ("GET", "/readyz"),
]


@pytest.mark.parametrize(("method", "path"), ASKING)
def test_that_redis_hangs_is_told_within_2_s(hung: TestClient, method: str, path: str) -> None:
    body = tiny_recipe("a")
    if path == "/scores":
        del body["models"][0]["evaluation"]
    elif path.endswith("/predict"):
        body = {"model": "a", "rows": [{"text": "x"}]}

    def told() -> float:
        if path in ("/jobs", "/merge", "/readyz"):
            time.sleep(HUNG_S)  # so that it is not told by what was found out a moment ago
        began = time.monotonic()
        headers = {"Prefer": "wait=10"}
        response = hung.request(method, path, json=body if method in ("POST", "PUT") else None, headers=headers)
        took = time.monotonic() - began
        code = "not_ready" if path == "/readyz" else "redis_unavailable"
        assert (response.status_code, response.json()["code"]) == (503, code)
        return took

    keeps_within(TOLD_WITHIN_S, told)


def test_metrics_say_within_2_s_that_redis_hangs(hung: TestClient) -> None:
    def told() -> float:
        time.sleep(HUNG_S)
        began = time.monotonic()
        response = hung.get("/metrics")
        took = time.monotonic() - began
        assert response.status_code == 200
        assert response.text.splitlines()[-1] == "maskmerge_redis_up 0.0"
        return took

    keeps_within(TOLD_WITHIN_S, told)


def test_every_route_that_asks_redis_is_among_these(hung: TestClient) -> None:
    without = {"/healthz", "/methods", "/metrics"}  # the last has a test of its own
    paths = hung.get("/openapi.json").json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods if path not in without}
    names = {
        UNKNOWN: "{job_id}",
        KEY: "{key_id}",
        f"uploads/{DIGEST}": "uploads/{sha256}",
        DIGEST: "{digest}",
        "artifacts/a": "artifacts/{name}",
    }
    names["/mine"] = "/{key}"
    names["/deliveries/1/"] = "/deliveries/{n}/"
    asked = set()
    for method, path in ASKING:
        for unknown, name in names.items():
            path = path.replace(unknown, name)
        asked.add((method, path))
    assert {(method, path) for method, path in routes if method != "HEAD"} == asked


def test_many_who_ask_at_once_are_told_as_soon(hung: TestClient) -> None:
    """More than there are threads that answer."""

    def told() -> float:
        time.sleep(HUNG_S)
        began = time.monotonic()
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: hung.get("/jobs"), range(100)))
        assert {answer.status_code for answer in answers} == {503}
        return time.monotonic() - began

    keeps_within(TOLD_WITHIN_S + 1.0, told)  # a thread for each of them takes the test's time, too


def test_what_needs_no_redis_is_answered_while_it_hangs(hung: TestClient) -> None:
    for path in ("/healthz", "/methods"):
        assert hung.get(path).status_code == 200
