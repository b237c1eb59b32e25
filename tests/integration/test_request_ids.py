"""Every answer has its request's id, and so has every line that is logged meanwhile."""

import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.settings import Settings
from app.main import create_app
from app.observability.context import facts
from tests.conftest import BASE_URL, HERE, assert_problem


@pytest.fixture(scope="module")
def api(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path_factory.mktemp("ids"), queue="ids")
    app = create_app(settings)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("a fault")

    with TestClient(app, BASE_URL, client=HERE, raise_server_exceptions=False) as client:
        yield client


class Lines(logging.Handler):
    """Keeps lines of the log with the facts that they were written under."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[logging.LogRecord, dict[str, str | int]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record, dict(facts())))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("app")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_proper_id_is_kept_and_told(api: TestClient, redis: Redis) -> None:
    answer = api.get("/jobs", headers={"X-Request-ID": "Build-7.step_1"})
    assert answer.headers["X-Request-ID"] == "Build-7.step_1"


@pytest.mark.parametrize("sent", [[], [""], ["a b"], ["x" * 129], ["é"], ["a\tb"], ["a", "b"], ["<script>"]])
def test_any_other_is_replaced(api: TestClient, redis: Redis, sent: list[str]) -> None:
    headers = [(b"X-Request-ID", value.encode("latin-1")) for value in sent]
    ids = [api.get("/jobs", headers=headers).headers["X-Request-ID"] for _ in range(2)]
    assert all(len(found) == 32 and int(found, 16) for found in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/nothing", {}, 404, "not_found"),
        ("PUT", "/jobs", {}, 405, "method_not_allowed"),
        ("GET", "/jobs", {"Host": "evil.example"}, 421, "unknown_host"),
        ("POST", "/merge", {"Content-Type": "application/json"}, 400, "malformed"),
        ("GET", "/broken", {}, 500, "internal"),
    ],
)
def test_every_problem_has_its_id_and_a_line(
    api: TestClient, redis: Redis, lines: Lines, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    answer = api.request(method, path, headers={**headers, "X-Request-ID": "mine"})
    assert_problem(answer, status, code)
    assert answer.json()["request_id"] == "mine"
    record, known = next((record, known) for record, known in lines.kept if record.name == "app.access")
    assert (known["request_id"], record.__dict__["method"], record.__dict__["status"]) == ("mine", method, status)
    if status == 500:
        failed, known = next((record, known) for record, known in lines.kept if record.levelno == logging.ERROR)
        assert (failed.name, known["request_id"]) == ("app.api.errors", "mine")


def test_a_line_tells_route_job_and_tenant_and_neither_path_nor_query(
    api: TestClient, redis: Redis, lines: Lines
) -> None:
    job = f"{7:028x}"
    api.get(f"/jobs/{job}?wait=secret")
    api.get("/jobs?label=a:secret")
    api.get("/jobs/secret")
    records = [(record, known) for record, known in lines.kept if record.name == "app.access"]
    assert [(known.get("job"), known.get("tenant")) for _, known in records] == [
        (job, "default"),
        (None, "default"),
        (None, "default"),
    ]
    assert [record.__dict__["route"] for record, _ in records] == ["/jobs/{job_id}", "/jobs", "/jobs/{job_id}"]
    assert "secret" not in str([(record.getMessage(), record.__dict__, known) for record, known in records])


def test_probes_that_are_answered_are_no_news(api: TestClient, redis: Redis, lines: Lines) -> None:
    assert api.get("/healthz").status_code == api.get("/metrics").status_code == 200
    assert api.get("/readyz").status_code == 503
    assert [record.__dict__["route"] for record, _ in lines.kept] == ["/readyz"]
