"""Who sees what on the dashboard: sessions, tenants, scopes, and pages of other sites."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import NewKey, Scope
from app.contracts.jobs import ModelProgress, PhaseName, Progress
from app.contracts.settings import Settings
from app.dashboard.route import COOKIE
from app.main import create_app
from app.storage.api_keys import ApiKeys
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.tasks import CutScoring, NewShard, ScoringPhase
from tests.conftest import BASE_URL, HERE, assert_problem

PORTAL = "http://localhost:3000"
FAILURES = 20  # that an address may have within a minute


@pytest.fixture(scope="module")
def settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Settings:
    data = tmp_path_factory.mktemp("dashboard")
    origins = (PORTAL,)
    return Settings(
        redis_url=SecretStr(redis_url),
        data_dir=data,
        queue="dashboard",
        local_roots=(tiny_inputs,),
        cors_origins=origins,
        max_failed_keys_per_minute=FAILURES,
    )


@pytest.fixture(scope="module")
def running(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), BASE_URL, client=HERE, follow_redirects=False) as client:
        yield client


@pytest.fixture
def api(running: TestClient, redis: Redis) -> TestClient:
    """The API with an empty Redis, as a browser without cookies sees it."""
    running.cookies.clear()
    return running


@pytest.fixture
def signed_in(api: TestClient, redis: Redis) -> Callable[..., str]:
    """Makes a key, signs in with it, and returns the key's id."""

    def sign_in(tenant: str = "default", *scopes: Scope) -> str:
        key = ApiKeys(redis, "dashboard").create(NewKey(tenant=tenant, scopes=list(scopes or (Scope.WRITE,))))
        api.cookies.clear()
        answer = api.post("/dashboard/login", data={"key": f" {key.key} ", "next": "/dashboard/queue?x=1"})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/dashboard/queue?x=1")
        return key.id

    return sign_in


def job_of(redis: Redis, tenant: str) -> str:
    store = JobStore(redis, "dashboard", 10, 5)
    model = {"name": "m", "checkpoint": "local:m"}
    request = {"method": {"name": "average"}, "models": [model]}
    return store.records.create(NewJob(request, f"job of {tenant}", tenant=tenant)).job_id


def test_without_keys_this_machine_sees_everything_and_pages_may_load_nothing_from_elsewhere(
    api: TestClient, redis: Redis
) -> None:
    answer = api.get("/")
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(policy.split("; "))
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert " style=" not in answer.text
    assert "Sign out" not in answer.text


def test_a_session_is_strict_hidden_from_scripts_and_ends(
    api: TestClient, signed_in: Callable[..., str], redis: Redis
) -> None:
    key_id = signed_in()
    key = ApiKeys(redis, "dashboard").create(NewKey())
    cookie = api.post("/dashboard/login", data={"key": key.key}).headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert key.key not in cookie
    assert not [name for name in redis.scan_iter() if key.key in str(redis.dump(name))]
    assert api.get("/").status_code == 200
    sessions = list(redis.scan_iter("dashboard:session:*"))
    assert len(sessions) == 2
    assert all(0 < int(redis.ttl(name)) <= 12 * 3600 for name in sessions)
    token = api.cookies[COOKIE]
    assert api.post("/dashboard/logout").headers["Location"] == "/"
    assert COOKIE not in api.cookies
    api.cookies[COOKIE] = token
    assert api.get("/").status_code == 401, "who keeps the cookie has no session any more"
    signed_in()
    ApiKeys(redis, "dashboard").revoke(key_id)
    assert api.get("/").status_code == 200
    for one in ApiKeys(redis, "dashboard").all():
        ApiKeys(redis, "dashboard").revoke(one.id)
    answer = api.get("/dashboard/queue")
    assert answer.status_code == 401
    assert "revoked" in answer.text
    assert 'value="/dashboard/queue"' in answer.text
    assert api.get("/", headers={"HX-Request": "true"}).headers["HX-Refresh"] == "true"


def test_a_session_counts_for_the_dashboard_and_not_for_the_api(api: TestClient, signed_in: Callable[..., str]) -> None:
    signed_in()
    assert_problem(api.get("/jobs"), 401, "unauthenticated")
    assert_problem(api.post("/merge", json={}), 401, "unauthenticated")


def test_each_tenant_sees_its_own_jobs_alone(api: TestClient, signed_in: Callable[..., str], redis: Redis) -> None:
    own, other = job_of(redis, "search"), job_of(redis, "ads")
    signed_in("search")
    listed = api.get("/").text
    assert "job of search" in listed
    assert "job of ads" not in listed
    assert api.get(f"/dashboard/jobs/{own}").status_code == 200
    for path in (f"jobs/{other}", f"jobs/{other}/report", f"jobs/{other}/archive", f"jobs/{other}/files/recipe.json",
                 f"compare?job={own}&job={other}", f"new/text?job={other}"):  # fmt: skip
        assert api.get(f"/dashboard/{path}").status_code == 404, path
    for action in ("cancel", "retry", "delete", "predict"):
        assert api.post(f"/dashboard/jobs/{other}/{action}").status_code == 404, action
    form = {"model": "m", "texts": "a text"}
    assert "its models can be tried when it has succeeded" in api.post(f"/dashboard/jobs/{own}/predict", data=form).text
    assert "rows" in api.post(f"/dashboard/jobs/{own}/predict", data={"model": "m", "texts": " "}).text
    queue = api.get("/dashboard/queue").text
    assert "job of search" in queue
    assert "ads" not in queue
    signed_in("ads", Scope.ADMIN)
    assert "search" in api.get("/dashboard/queue").text, "how much each tenant waits for is for admins"


def test_a_key_that_may_only_read_neither_changes_nor_lists_what_recipes_may_name(
    api: TestClient, signed_in: Callable[..., str], redis: Redis
) -> None:
    own = job_of(redis, "default")
    signed_in("default", Scope.READ)
    assert '<td class="wide-only">average</td>' in api.get("/").text, "the method of a job that waits"
    shown = api.get(f"/dashboard/jobs/{own}").text
    assert "Cancel" not in shown
    assert "/dashboard/new" not in shown
    for path in ("/dashboard/new", "/dashboard/new/text"):
        assert api.get(path).status_code == 403
    assert api.post(f"/dashboard/jobs/{own}/cancel").status_code == 403
    signed_in("default", Scope.METRICS)
    assert api.get("/").status_code == 403


def test_pages_of_other_sites_change_nothing_even_where_they_may_use_the_api(
    api: TestClient, signed_in: Callable[..., str], redis: Redis
) -> None:
    own = job_of(redis, "default")
    signed_in()
    foreign: list[dict[str, str]] = [
        {"Origin": PORTAL}, {"Origin": "null"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "same-site"},
    ]  # fmt: skip
    for headers in foreign:
        for path in (f"jobs/{own}/cancel", "login", "logout", "new"):
            assert api.post(f"/dashboard/{path}", headers=headers).status_code == 403, (headers, path)
    assert api.post(f"/dashboard/jobs/{own}/cancel", headers={"Origin": BASE_URL}).status_code == 303


def test_a_link_from_another_site_is_followed_once_the_cookie_is_there(
    api: TestClient, signed_in: Callable[..., str]
) -> None:
    signed_in()
    api.cookies.clear()  # browsers hold a strict cookie back
    refresh = '<meta http-equiv="refresh" content="0">'
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert refresh in api.get("/dashboard/queue", headers=followed).text
    assert refresh not in api.get("/dashboard/queue", headers={**followed, "Sec-Fetch-Site": "same-origin"}).text


def test_signing_in_with_a_false_key_says_why_is_counted_and_leads_nowhere_else(
    api: TestClient, signed_in: Callable[..., str]
) -> None:
    signed_in()
    answer = api.post("/dashboard/login", data={"key": "mm_<b>", "next": "https://evil.example/"})
    assert answer.status_code == 401
    assert "does not have the form" in answer.text
    assert "evil" not in answer.text
    assert "<b>" not in answer.text
    statuses = {api.post("/dashboard/login", data={"key": "mm_no"}).status_code for _ in range(2 * FAILURES)}
    assert statuses == {401, 429}
    assert api.post("/dashboard/login", json={"key": "mm_no"}).status_code == 415


def test_what_is_not_there_is_said_on_a_page(api: TestClient) -> None:
    missing = ("jobs/nothing", f"jobs/{'0' * 28}", f"statistics/{'0' * 64}", "static/nothing")
    for path in missing:
        answer = api.get(f"/dashboard/{path}")
        assert answer.status_code == 404, path
        assert answer.headers["Content-Type"].startswith("text/html")
    gone = api.get(f"/dashboard/jobs/{'0' * 28}", headers={"HX-Request": "true"})
    assert gone.headers["HX-Refresh"] == "true", "a page stops asking for what is gone"
    assert api.get("/?status=lost").status_code == 404
    assert api.get("/?nothing=1").status_code == 400
    assert api.get("/dashboard/compare").status_code == 400
    part = api.get("/dashboard/static/htmx.js")
    assert api.get("/dashboard/static/htmx.js", headers={"If-None-Match": part.headers["ETag"]}).status_code == 304


def test_a_form_is_sent_once_however_often_and_says_what_is_wrong(api: TestClient) -> None:
    fields = {"models.0.checkpoint": "local:checkpoints/a", "models.1.checkpoint": "local:checkpoints/c"}
    fields |= {"method": "average", "name": "<script>", "once": "one", "method.unknown": "1"}
    first, again = (api.post("/dashboard/new", data=fields) for _ in range(2))
    assert first.status_code == 303
    assert first.headers["Location"] == again.headers["Location"]
    shown = api.get(first.headers["Location"]).text
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    refused = api.post("/dashboard/new", data={**fields, "models.1.weight": "-1"})
    assert refused.status_code == 422
    assert 'href="#models.1.weight"' in refused.text
    assert 'value="-1"' in refused.text, "what was typed stays"
    text = api.post("/dashboard/new/as-text", data=fields).text
    assert "checkpoint: local:checkpoints/c" in text


def test_a_running_job_shows_how_far_each_model_is_and_which_worker_is_at_it(api: TestClient, redis: Redis) -> None:
    store, job_id = JobStore(redis, "dashboard", 10, 5), job_of(redis, "default")
    attempt = store.tasks.claim("first-worker")
    assert attempt is not None
    store.tasks.renew(attempt, Progress(phase=PhaseName.ALIGNING, models={"m": ModelProgress(done=3, total=8)}))
    shown = api.get(f"/dashboard/jobs/{job_id}").text
    assert "3 of 8" in shown
    assert "<code>first-worker</code>" in shown
    shards = [NewShard("m", 70, "local:m", "{}"), NewShard("m", 50, "local:m", "{}")]
    phase, of = ScoringPhase(start=0, span=1, total=130, least=0.02), {"m": ModelProgress(done=10, total=130)}
    assert store.tasks.split(attempt, CutScoring(shards, phase, of, {}))
    shard = store.tasks.claim("second-worker", "local:m")
    assert shard is not None
    store.tasks.renew(shard, Progress(done=30))
    shown = api.get(f"/dashboard/jobs/{job_id}").text
    assert "first-worker</code>" not in shown
    assert "<code>second-worker</code>" in shown
    assert {"40 of 130 examples", "30 of 70 examples"} <= set(re.findall(r"\d+ of \d+ examples", shown))
    assert "1 parts of the scoring wait" not in shown
    assert "1 part of the scoring waits" in shown
