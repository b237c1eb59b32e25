"""The API while Redis is away: honest answers, soon."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.contracts.settings import Settings
from app.main import create_app
from tests.conftest import BASE_URL, free_port, tiny_recipe


@pytest.fixture
def api(tmp_path: Path, tiny_inputs: Path) -> Iterator[TestClient]:
    settings = Settings(
        redis_url=f"redis://:secret-word@127.0.0.1:{free_port()}", data_dir=tmp_path, local_roots=(tiny_inputs,)
    )
    with TestClient(create_app(settings), BASE_URL) as client:
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


def test_validating_needs_no_redis(api: TestClient) -> None:
    assert api.post("/merge/validate", json=tiny_recipe()).status_code == 200


def test_the_process_is_alive_but_not_ready(api: TestClient) -> None:
    assert api.get("/healthz").status_code == 200
    response = api.get("/readyz")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready")
    assert "Redis does not answer" in response.json()["detail"]


def test_the_api_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MASKMERGE_REDIS_URL"):
        create_app(Settings(redis_url=None, data_dir=tmp_path))
