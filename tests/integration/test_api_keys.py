"""API keys and tenants, at the real server with a real Redis."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import DEFAULT_TENANT, Caller, NewKey, Scope
from app.contracts.settings import Settings
from app.main import create_app
from app.server import Server
from app.storage.api_keys import TOKEN, ApiKeys, KeyRefused
from app.storage.jobs import JobStore
from app.storage.keys import Keys
from app.storage.records import NewJob
from app.storage.versions import FORMAT, check_redis, upgrade_redis
from tests.conftest import BASE_URL, HANGS_S, HERE, REPOSITORY, assert_problem, free_port, tiny_recipe, wait_until

ANYWHERE = "0.0.0.0"  # noqa: S104 - what needs a key is listened on in two tests
ELSEWHERE = ("192.0.2.7", 50000)


@pytest.fixture
def keys(redis: Redis) -> ApiKeys:
    return ApiKeys(redis, "keys")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def settings(redis_url: str, root: Path, tiny_inputs: Path) -> Settings:
    roots = (root / "of" / "{tenant}", tiny_inputs)
    return Settings(redis_url=SecretStr(redis_url), data_dir=root / "data", queue="keys", local_roots=roots)


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[TestClient]:
    """The API for callers from elsewhere. Its Redis is emptied between tests."""
    with TestClient(create_app(settings), BASE_URL, client=ELSEWHERE) as client:
        yield client


@pytest.fixture
def bearer(keys: ApiKeys) -> Callable[..., dict[str, str]]:
    """Makes a key, and the header that has it."""

    def made(scope: str = "write", tenant: str = DEFAULT_TENANT, **more: Any) -> dict[str, str]:
        key = keys.create(NewKey.model_validate({"scopes": [scope], "tenant": tenant, **more}))
        return {"Authorization": f"Bearer {key.key}"}

    return made


def test_a_key_is_kept_as_its_digest_and_told_once(keys: ApiKeys, redis: Redis) -> None:
    made = keys.create(NewKey(name="nightly", tenant="search", scopes=[Scope.READ, Scope.WRITE]))
    assert TOKEN.fullmatch(made.key)
    assert made.key.startswith(f"{made.prefix}_")
    secret = made.key.removeprefix(f"{made.prefix}_")
    kept = "".join(str(redis.hgetall(name)) for name in redis.scan_iter("keys:key:*"))
    assert secret not in kept
    assert [key.model_dump() for key in keys.all()] == [made.model_dump(exclude={"key"})]
    assert keys.caller(made.key) == Caller(tenant="search", scopes=frozenset({Scope.READ, Scope.WRITE}), key_id=made.id)
    [used] = keys.all()
    assert used.last_used_at is not None
    assert abs(used.last_used_at - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_key_with_another_secret_a_revoked_and_an_expired_one_are_refused(keys: ApiKeys) -> None:
    made, other = keys.create(NewKey()), keys.create(NewKey())
    mixed = f"{made.prefix}_{other.key.removeprefix(other.prefix + '_')}"
    for unknown in (
        mixed,
        made.key[:-1],
        made.key + "A",
        "mm_",
        "",
        "mm_" + "0" * 16 + "_" + "A" * 43,
        f"{made.key}\n",
    ):
        with pytest.raises(KeyRefused, match=r"unknown|does not have the form"):
            keys.caller(unknown)
    assert keys.revoke(made.id)
    assert keys.revoke(made.id), "a second time changes nothing"
    with pytest.raises(KeyRefused, match="revoked"):
        keys.caller(made.key)
    assert not keys.revoke("0" * 16)
    expired = keys.create(NewKey(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    with pytest.raises(KeyRefused, match="expired"):
        keys.caller(expired.key)
    assert keys.caller(other.key).tenant == DEFAULT_TENANT
    assert [key.revoked_at is not None for key in keys.all()] == [True, False, False]


def test_keys_are_listed_in_the_order_in_which_they_were_made(keys: ApiKeys) -> None:
    made = [keys.create(NewKey()).id for _ in range(20)]
    assert [key.id for key in keys.all()] == made


def test_without_keys_this_machine_alone_is_answered(api: TestClient, settings: Settings, keys: ApiKeys) -> None:
    response = api.get("/jobs")
    assert_problem(response, 401, "unauthenticated")
    assert "maskmerge keys create" in response.json()["detail"]
    for address in (HERE, ("::1", 50000), ("::ffff:127.0.0.1", 50000)):
        here = TestClient(api.app, BASE_URL, client=address)
        assert here.get("/jobs").status_code == 200
        assert here.get("/keys").status_code == 200, "whoever is on the machine may do everything"
        assert_problem(here.get("/jobs", headers={"Authorization": "Bearer mm_nonsense"}), 401, "unauthenticated")
    made = keys.create(NewKey())
    keys.revoke(made.id)
    assert_problem(here.get("/jobs"), 401, "unauthenticated")  # once there was a key, everybody needs one


def test_what_needs_no_key_tells_nothing_of_jobs(api: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    bearer()
    for path in ("/healthz", "/readyz", "/methods", "/openapi.json", "/docs"):
        assert api.get(path).status_code != 401
    document = api.get("/openapi.json").json()
    public = {path for path, methods in document["paths"].items() for of in methods.values() if not of["security"]}
    assert public == {"/healthz", "/readyz", "/methods"}
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


PLACES = {
    "{job_id}": "0" * 28,
    "{key_id}": "1" * 16,
    "{digest}": "2" * 64,
    "{sha256}": "2" * 64,
    "{name}": "a",
    "{key}": "mine",
    "{n}": "1",
}


def test_each_operation_needs_its_scope_before_anything_else_is_looked_at(
    api: TestClient, bearer: Callable[..., dict[str, str]]
) -> None:
    held = {scope: bearer(scope) for scope in Scope}
    asked = 0
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            if not operation["security"]:
                continue
            needed = Scope.READ if method in ("get", "head") else Scope.WRITE
            if path.startswith(("/keys", "/metrics")):
                needed = Scope.METRICS if path == "/metrics" else Scope.ADMIN
            for name, value in PLACES.items():
                path = path.replace(name, value)
            # The body is not even JSON: whoever may not send it does not hear of that.
            content, kind = (b"{", {"Content-Type": "application/json"}) if method in ("post", "put") else (None, {})
            without = api.request(method, path, content=content, headers=kind)
            assert (without.status_code, without.headers["WWW-Authenticate"]) == (401, "Bearer")
            for scope, header in held.items():
                asked += 1
                response = api.request(method, path, content=content, headers={**kind, **header})
                if needed in scope.included:
                    assert response.status_code not in (401, 403), (method, path, scope)
                else:
                    assert response.status_code == 403, (method, path, scope)
                    assert f'scope="{needed}"' in response.headers["WWW-Authenticate"]
                    assert_problem(response, 403, "insufficient_scope")
    assert asked == len(Scope) * 29, "every operation but the public ones"


@pytest.mark.parametrize("sent", ["", "Bearer", "Basic bW06bW0=", "Bearer a b", "mm_0"])
def test_a_header_that_is_no_bearer_token_is_refused(
    api: TestClient, bearer: Callable[..., dict[str, str]], sent: str
) -> None:
    bearer()
    response = api.get("/jobs", headers={"Authorization": sent})
    assert_problem(response, 401, "unauthenticated")


def test_two_keys_at_once_are_refused(api: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    twice = [("Authorization", bearer()["Authorization"]), ("Authorization", bearer()["Authorization"])]
    assert_problem(api.get("/jobs", headers=twice), 401, "unauthenticated")


def test_keys_are_made_listed_and_revoked_over_http(api: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    admin = bearer("admin")
    made = api.post("/keys", json={"name": "ci", "tenant": "search", "scopes": ["read"]}, headers=admin)
    assert (made.status_code, made.headers["Cache-Control"]) == (201, "no-store")
    key = made.json()
    theirs = {"Authorization": f"Bearer {key['key']}"}
    assert api.get("/jobs", headers=theirs).json() == {"data": [], "next": None}
    listed = api.get("/keys", headers=admin)
    assert key["key"].removeprefix(key["prefix"]) not in listed.text
    assert [entry["id"] for entry in listed.json()["data"]][1:] == [key["id"]]
    assert api.delete(f"/keys/{key['id']}", headers=admin).status_code == 204
    assert_problem(api.get("/jobs", headers=theirs), 401, "unauthenticated")
    assert_problem(api.delete(f"/keys/{'0' * 16}", headers=admin), 404, "not_found")
    for body, field in (
        ({"tenant": "../up"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": 1893456000}, "expires_at"),
        ({"expires_at": "0001-01-01T00:00:00+14:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
        ({"name": "red \x1b[31m"}, "name"),
        ({"secret": "mine"}, ""),
    ):
        refused = api.post("/keys", json=body, headers=admin)
        assert_problem(refused, 422, "invalid_request")
        assert [error["field"] for error in refused.json()["errors"]] == [field]
    for end in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"):
        assert api.post("/keys", json={"expires_at": end}, headers=admin).status_code == 201
    ends = [entry["expires_at"] for entry in api.get("/keys", headers=admin).json()["data"]]
    assert ends[-2:] == ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]


def test_a_stream_of_events_ends_with_its_key(api: TestClient, keys: ApiKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.events.KEY_HOLDS_S", 0.0)
    key = keys.create(NewKey())
    headers = {"Authorization": f"Bearer {key.key}"}
    job = api.post("/merge", json=tiny_recipe("a", "b", name="average"), headers=headers).json()["id"]
    assert api.post(f"/jobs/{job}/cancel", headers=headers).status_code == 202
    watcher = api.app.state.services.watcher  # type: ignore[attr-defined]
    follow = watcher.follow

    async def revoked_after_the_first(job_id: str, after: int) -> AsyncIterator[Any]:
        async for event in follow(job_id, after):
            yield event
            keys.revoke(key.id)

    assert api.get(f"/jobs/{job}/events", headers=headers).text.count("event: ") == 2
    monkeypatch.setattr(watcher, "follow", revoked_after_the_first)
    assert api.get(f"/jobs/{job}/events", headers=headers).text.count("event: ") == 1
    assert_problem(api.get(f"/jobs/{job}/events", headers=headers), 401, "unauthenticated")


def test_another_tenants_jobs_are_not_there(
    api: TestClient, settings: Settings, redis: Redis, bearer: Callable[..., dict[str, str]]
) -> None:
    ours, theirs = bearer("admin", "ours"), bearer("admin", "theirs")
    recipe = tiny_recipe("a", "b", name="average")
    job = api.post("/merge", json=recipe, headers={**ours, "Idempotency-Key": "one"}).json()["id"]
    assert [found["id"] for found in api.get("/jobs", headers=ours).json()["data"]] == [job]
    assert api.get("/jobs", headers=theirs).json()["data"] == []
    unknown = api.get(f"/jobs/{'0' * 28}", headers=theirs).json()
    for method, rest in (
        *product(("GET",), ("", "/events", "/artifacts", "/artifacts/a", "/archive", "/report")),
        *product(("POST",), ("/cancel", "/retry")),
        ("DELETE", ""),
    ):
        refused = api.request(method, f"/jobs/{job}{rest}", headers=theirs)
        assert_problem(refused, 404, "not_found")
        assert refused.json()["detail"] == unknown["detail"].replace("0" * 28, job)
    assert api.get(f"/jobs/{job}", headers=ours).json()["status"] == "queued"
    other = api.post("/merge", json=recipe, headers={**theirs, "Idempotency-Key": "one"}).json()["id"]
    assert other != job, "keys of one tenant say nothing of another's jobs"
    recipe["models"][0]["checkpoint"] = f"job:{job}/a"
    for header, told in ((ours, "queued"), (theirs, f"there is no job {job}")):
        refused = api.post("/merge", json=recipe, headers=header)
        assert_problem(refused, 422, "invalid_request")
        assert told in refused.json()["detail"]
    assert api.post(f"/jobs/{job}/cancel", headers=ours).status_code == 202
    assert api.delete(f"/jobs/{job}", headers=ours).status_code == 204
    assert "was deleted" in api.get(f"/jobs/{job}", headers=ours).json()["detail"]
    assert api.get(f"/jobs/{job}", headers=theirs).json()["detail"] == f"there is no job {job}"
    assert api.get("/jobs", headers=ours).json()["data"] == []


def test_each_tenant_has_local_roots_of_its_own(
    api: TestClient, root: Path, tiny_inputs: Path, bearer: Callable[..., dict[str, str]]
) -> None:
    (root / "of" / "ours").mkdir(parents=True)
    (root / "of" / "ours" / "mine").symlink_to("a")
    subprocess.run(["cp", "-r", tiny_inputs / "checkpoints" / "a", root / "of" / "ours" / "a"], check=True)
    recipe = tiny_recipe("a", "b", name="average")
    recipe["models"][0]["checkpoint"] = "local:a"
    assert api.post("/merge/validate", json=recipe, headers=bearer(tenant="ours")).status_code == 200
    refused = api.post("/merge/validate", json=recipe, headers=bearer(tenant="theirs"))
    assert_problem(refused, 422, "invalid_request")
    assert "does not exist under any local root" in refused.json()["detail"]
    recipe["models"][0]["checkpoint"] = "local:../ours/a"
    assert_problem(api.post("/merge/validate", json=recipe, headers=bearer(tenant="theirs")), 422, "invalid_request")


def test_jobs_of_releases_without_tenants_are_the_default_tenants(redis: Redis) -> None:
    made = JobStore(redis, "keys", lease_seconds=10, max_losses=3)
    ids = [made.records.create(NewJob({}, f"{number}")).job_id for number in range(130)]
    theirs = made.records.create(NewJob({}, "theirs", tenant="theirs")).job_id
    ids.sort(reverse=True)
    assert [record.id for record in made.records.newest()] == ids
    redis.delete("keys:jobs:default")
    for job_id in ids:
        redis.hdel(f"keys:job:{job_id}", "tenant")
    upgraded = JobStore(redis, "keys", lease_seconds=10, max_losses=3)
    assert check_redis(redis, Keys("keys")) < FORMAT
    upgrade_redis(redis, Keys("keys"))
    assert check_redis(redis, Keys("keys")) == FORMAT
    assert [record.id for record in upgraded.records.newest()] == ids
    assert [record.id for record in upgraded.records.newest(tenant="theirs")] == [theirs]
    record = upgraded.records.get(ids[0])
    assert record is not None
    assert record.tenant == DEFAULT_TENANT


@pytest.mark.parametrize(("host", "needs"), [("127.0.0.1", False), ("::1", False), ("localhost", False),
                                            (ANYWHERE, True), ("::", True), ("api.example.org", True)])  # fmt: skip
def test_other_addresses_need_a_key(settings: Settings, keys: ApiKeys, host: str, needs: bool) -> None:
    listening = settings.model_copy(update={"host": host, "port": free_port()})
    if needs:
        with pytest.raises(ValueError, match="maskmerge keys create --scope admin"):
            Server(listening)
        keys.create(NewKey())
    assert Server(listening).started is False


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=False)


def test_the_command_line_makes_lists_and_revokes_keys_of_a_data_folder_that_no_service_has(tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path / "data")]
    made = run("keys", "create", *data, "--name", "ci", "--tenant", "search", "--scope", "admin", "--expires", "90d")
    assert (made.returncode, len(made.stdout.splitlines())) == (0, 1), made.stderr
    found = TOKEN.fullmatch(made.stdout.strip())
    assert found is not None
    assert "key" in made.stderr
    assert found[0] not in made.stderr
    header, line = run("keys", "list", *data).stdout.splitlines()
    assert header.split() == ["id", "tenant", "scopes", "created", "last", "used", "state", "name"]
    assert re.split(r" {2,}", line)[:3] == [found["id"], "search", "admin"]
    assert "until" in line
    revoked = run("keys", "revoke", found["prefix"], *data)
    assert (revoked.returncode, revoked.stderr) == (0, "")
    assert "revoked" in run("keys", "list", *data).stdout
    unknown = run("keys", "revoke", "0" * 16, *data)
    assert (unknown.returncode, "there is no key" in unknown.stderr) == (1, True)
    wrong = run("keys", "create", *data, "--tenant", "Not One")
    assert (wrong.returncode, "tenant" in wrong.stderr) == (2, True)
    assert run("keys", "create", *data, "--expires", "soon").returncode == 2


def test_a_service_on_all_addresses_starts_with_a_key_and_takes_new_ones_while_it_runs(
    tmp_path: Path, tiny_inputs: Path
) -> None:
    port = free_port()
    data = ["--data-dir", str(tmp_path / "data")]
    serve = ["serve", *data, "--host", ANYWHERE, "--port", str(port), "--local-root", str(tiny_inputs)]
    refused = run(*serve)
    assert refused.returncode == 1
    assert "maskmerge keys create --scope admin --data-dir" in refused.stderr
    first = run("keys", "create", *data, "--scope", "admin").stdout.strip()
    with ExitStack() as held:
        service = subprocess.Popen(
            [sys.executable, "-m", "app.cli", *serve],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            http = held.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}"))

            def answers() -> bool:
                try:
                    return http.get("/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, "the service")
            assert http.get("/jobs").status_code == 401, "this machine needs a key too"
            second = run("keys", "create", *data, "--tenant", "search").stdout.strip()
            for key in (first, second):
                assert http.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            command = Path(f"/proc/{service.pid}/cmdline").read_text()
            assert first not in command
        finally:
            service.terminate()
            assert service.wait(HANGS_S) == 0
