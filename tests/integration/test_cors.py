"""Pages of named origins call the API from a browser, and pages of no other do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError
from redis import Redis

from app.contracts.api_keys import NewKey
from app.contracts.settings import Settings
from app.main import create_app
from app.storage.api_keys import ApiKeys
from tests.conftest import BASE_URL, HERE, assert_problem

ORIGIN, OTHER = "https://app.example.org", "https://evil.example"


@pytest.fixture
def settings(redis: Redis, redis_url: str, tmp_path: Path) -> Settings:
    origins = ("https://APP.example.org:443", "http://localhost:3000")
    return Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path, queue="cors", cors_origins=origins)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


def preflight(api: TestClient, origin: str, method: str = "POST", **headers: str) -> dict[str, str]:
    asked = {"Origin": origin, "Access-Control-Request-Method": method, **headers}
    response = api.options("/merge", headers=asked)
    assert response.status_code == 200, response.text
    return dict(response.headers)


def test_a_page_may_send_what_the_service_takes_with_its_key_and_without_cookies(api: TestClient) -> None:
    wanted = "authorization, content-type, idempotency-key, if-none-match, prefer, range, last-event-id"
    for method in ("GET", "POST", "PUT", "DELETE"):
        found = preflight(api, ORIGIN, method, **{"Access-Control-Request-Headers": wanted})
        assert found["access-control-allow-origin"] == ORIGIN
        assert method in found["access-control-allow-methods"]
        assert found["access-control-allow-headers"] == wanted
        assert "access-control-allow-credentials" not in found
        assert "Origin" in found["vary"]


def test_a_page_reaches_a_service_in_a_private_network(api: TestClient) -> None:
    asked = {"Access-Control-Request-Private-Network": "true"}
    assert preflight(api, ORIGIN, **asked)["access-control-allow-private-network"] == "true"
    response = api.options("/merge", headers={"Origin": OTHER, "Access-Control-Request-Method": "POST", **asked})
    assert "access-control-allow-private-network" not in response.headers


@pytest.mark.parametrize(
    "origin",
    [OTHER, "null", "*", "http://app.example.org", f"{ORIGIN}:8443", f"{ORIGIN}.evil.example", "", f"{ORIGIN}/"],
)
def test_a_page_of_another_origin_is_refused_and_reads_nothing(api: TestClient, origin: str) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    response = api.options("/merge", headers=asked)
    assert_problem(response, 403, "foreign_origin")
    assert "MASKMERGE_CORS_ORIGINS" in response.json()["detail"]
    for answer in (response, api.get("/jobs", headers=asked), api.post("/merge", headers=asked, json={})):
        assert "access-control-allow-origin" not in answer.headers
    assert_problem(api.post("/merge", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"}, json={}), 403,
                   "foreign_origin")  # fmt: skip


def test_a_method_that_no_route_takes_is_refused_in_words(api: TestClient) -> None:
    response = api.options("/merge", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "PROPFIND"})
    assert_problem(response, 403, "foreign_origin")
    assert "PROPFIND" in response.json()["detail"]


def test_a_page_reads_answers_their_headers_and_refusals(api: TestClient, redis: Redis) -> None:
    page = {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}
    listed = api.get("/jobs", headers=page)
    assert (listed.status_code, listed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    exposed = {name.strip().lower() for name in listed.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {"location", "etag", "retry-after", "repr-digest", "ratelimit", "content-range"}
    refused = api.post("/merge", headers=page, json={})
    assert_problem(refused, 422, "invalid_request")
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    key = ApiKeys(redis, "cors").create(NewKey()).key
    assert_problem(api.get("/jobs", headers=page), 401, "unauthenticated")
    assert_problem(api.get("/jobs", headers={**page, "Cookie": f"key={key}"}), 401, "unauthenticated")
    assert api.get("/jobs", headers={**page, "Authorization": f"Bearer {key}"}).status_code == 200


def test_caches_keep_answers_to_different_origins_apart(api: TestClient) -> None:
    for headers in ({}, {"Origin": ORIGIN}, {"Origin": OTHER}):
        assert "Origin" in api.get("/methods", headers=headers).headers["vary"]


def test_without_named_origins_no_header_speaks_of_them(settings: Settings) -> None:
    closed = settings.model_copy(update={"cors_origins": ()})
    with TestClient(create_app(closed), BASE_URL, client=HERE) as api:
        asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        assert_problem(api.options("/merge", headers=asked), 405, "method_not_allowed")
        for answer in (api.options("/merge", headers=asked), api.get("/jobs", headers=asked)):
            assert not [name for name in answer.headers if name.startswith("access-control-") or name == "vary"]


@pytest.mark.parametrize(
    "text", ["*", "null", "app.example.org", f"{ORIGIN}/", f"{ORIGIN}/page", "https://*.example.org", "ftp://a.org", "https://a.org:x",
             "https://me@a.org", "file://"]
)  # fmt: skip
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"write it as https://app\.example\.org"):
        Settings(cors_origins=text)


def test_origins_are_kept_as_browsers_write_them(settings: Settings) -> None:
    assert settings.cors_origins == (ORIGIN, "http://localhost:3000")
