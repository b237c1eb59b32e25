"""`/uploads` at the app, with a real Redis: ranges, refusals and tenants."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from redis import Redis

from app.contracts.api_keys import NewKey, Scope
from app.contracts.settings import Settings
from app.contracts.uploads import manifest
from app.main import create_app
from app.storage.api_keys import ApiKeys
from app.storage.tenants import uploads_of
from app.storage.uploads import remove_unused
from tests.conftest import BASE_URL, HERE, Answer, assert_problem

ROWS = b'{"text": "a", "label": 0}\n' * 100
MOST = 1_000_000


@pytest.fixture(scope="module")
def settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        redis_url=SecretStr(redis_url),
        data_dir=tmp_path_factory.mktemp("uploads"),
        queue="uploads",
        max_upload_bytes=MOST,
        max_body_bytes=1024,
    )


@pytest.fixture(scope="module")
def app(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture
def api(app: TestClient, redis: Redis, settings: Settings) -> TestClient:
    """The API without uploads."""
    for sha256 in os.listdir(folder) if (folder := uploads_of(settings.data_dir, "default")).exists() else ():
        app.delete(f"/uploads/{sha256}")
    return app


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(api: TestClient, content: bytes, *, of: bytes | None = None, range_: str | None = None, **more: Any) -> Answer:
    params = {"name": "rows.jsonl", **more}
    headers = {"Content-Range": range_} if range_ else {}
    path = f"/uploads/{digest(content if of is None else of)}"
    return api.put(path, content=content, params={k: v for k, v in params.items() if v}, headers=headers)


def progress(response: Answer) -> tuple[int, str, str, str]:
    headers = response.headers
    return response.status_code, headers["Upload-Offset"], headers["Upload-Length"], headers["Upload-Complete"]


def test_an_upload_comes_in_parts_whose_place_is_asked_for(api: TestClient) -> None:
    size = str(len(ROWS))
    assert_problem(api.get(f"/uploads/{digest(ROWS)}"), 404, "not_found")
    first = put(api, ROWS[:100], of=ROWS, range_=f"bytes 0-99/{size}")
    assert progress(first) == (202, "100", size, "?0")
    assert progress(api.head(f"/uploads/{digest(ROWS)}")) == (200, "100", size, "?0")
    last = put(api, ROWS[100:], of=ROWS, range_=f"bytes 100-{len(ROWS) - 1}/{size}")
    assert progress(last) == (201, size, size, "?1")
    assert last.headers["Location"] == f"/uploads/{digest(ROWS)}"
    found = api.get(f"/uploads/{digest(ROWS)}").json()
    assert found == last.json() | {"expires_at": found["expires_at"]}
    assert (found["name"], found["kind"], found["complete"]) == ("rows.jsonl", "file", True)
    assert found["reference"] == f"upload:{digest(ROWS)}"
    again = put(api, ROWS)
    assert progress(again) == (200, size, size, "?1")
    assert api.delete(f"/uploads/{digest(ROWS)}").status_code == 204
    assert_problem(api.delete(f"/uploads/{digest(ROWS)}"), 404, "not_found")


def test_gaps_and_overlaps_are_refused_and_say_where_to_go_on(api: TestClient) -> None:
    size = len(ROWS)
    put(api, ROWS[:100], of=ROWS, range_=f"bytes 0-99/{size}")
    for first, last in ((0, 99), (50, 149), (99, 199), (101, 199)):
        response = put(api, ROWS[first : last + 1], of=ROWS, range_=f"bytes {first}-{last}/{size}")
        assert_problem(response, 409, "wrong_offset")
        assert response.headers["Upload-Offset"] == "100"
    assert put(api, ROWS[100:200], of=ROWS, range_=f"bytes 100-199/{size}").status_code == 202


def test_an_upload_without_ranges_begins_anew(api: TestClient) -> None:
    put(api, b"another beginning", of=ROWS, range_=f"bytes 0-16/{len(ROWS)}")
    assert put(api, ROWS).status_code == 201


def test_what_was_announced_does_not_change(api: TestClient) -> None:
    size = len(ROWS)
    put(api, ROWS[:100], of=ROWS, range_=f"bytes 0-99/{size}")
    rest: dict[str, Any] = {"of": ROWS, "range_": f"bytes 100-{size - 1}/{size}"}
    assert_problem(put(api, ROWS[100:200], of=ROWS, range_=f"bytes 100-199/{size + 1}"), 409, "conflict")
    assert_problem(put(api, ROWS[100:], **rest, name="rows.csv"), 409, "conflict")
    assert_problem(put(api, ROWS[100:], **rest, name=None, kind="folder"), 409, "conflict")
    assert put(api, ROWS[100:], **rest, name="others.jsonl").status_code == 201
    assert_problem(put(api, ROWS, name="rows.csv"), 409, "conflict")


@pytest.mark.parametrize(
    "range_",
    ["bytes 0-9", "bytes 0-9/*", "bytes=0-9/10", "bytes 9-0/10", "bytes 0-10/10", "bytes -9/10", "bytes a-9/10",
     "bytes 0-8/10", "bytes */10", "items 0-9/10", "bytes 0-9/10, 0-9/10", f"bytes 0-9/{'9' * 30}"],
)  # fmt: skip
def test_a_range_that_is_none_of_the_body_is_malformed(api: TestClient, range_: str) -> None:
    assert_problem(put(api, ROWS[:10], range_=range_), 400, "malformed")
    assert_problem(api.get(f"/uploads/{digest(ROWS[:10])}"), 404, "not_found")


def test_a_body_of_another_length_than_it_announces(api: TestClient) -> None:
    size = len(ROWS)

    def sent(content: bytes) -> Answer:  # in chunks, without Content-Length
        return api.put(
            f"/uploads/{digest(ROWS)}",
            params={"name": "a.jsonl"},
            content=iter([content]),
            headers={"Content-Range": f"bytes 0-99/{size}"},
        )

    assert_problem(sent(ROWS[:101]), 400, "malformed")
    assert api.head(f"/uploads/{digest(ROWS)}").headers["Upload-Offset"] == "0"
    assert_problem(sent(ROWS[:60]), 400, "malformed")
    assert api.head(f"/uploads/{digest(ROWS)}").headers["Upload-Offset"] == "60"  # what came is kept
    no_length = api.put(f"/uploads/{digest(ROWS)}", params={"name": "a.jsonl"}, content=iter([ROWS]))
    assert_problem(no_length, 400, "malformed")


def test_a_whole_upload_is_finished_without_a_body(api: TestClient) -> None:
    response = put(api, b"", of=ROWS, range_=f"bytes */{len(ROWS)}")
    assert progress(response) == (202, "0", str(len(ROWS)), "?0")
    assert progress(put(api, b"", range_="bytes */0")) == (201, "0", "0", "?1")  # an empty file
    assert put(api, b"", name="empty.jsonl").status_code == 200


def test_bytes_of_another_digest_are_dropped(api: TestClient) -> None:
    response = put(api, ROWS[:-1] + b" ", of=ROWS)
    assert_problem(response, 422, "upload_refused")
    assert digest(ROWS[:-1] + b" ") in response.json()["detail"]
    assert_problem(api.get(f"/uploads/{digest(ROWS)}"), 404, "not_found")
    assert put(api, ROWS).status_code == 201


@pytest.mark.parametrize(
    "name", ["../a.json", "/etc/a.json", "a/b.json", "model.bin", "model.pt", "a.py", "a.pkl", "a"]
)
def test_hostile_names_are_refused(api: TestClient, name: str) -> None:
    assert_problem(put(api, ROWS, name=name), 422, "upload_refused")
    assert_problem(put(api, ROWS, name=None), 422, "upload_refused")
    assert_problem(api.get(f"/uploads/{digest(ROWS)}"), 404, "not_found")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no weights", "header"),
        ((2**40).to_bytes(8, "little") + b"{}", "allowed"),
        ((20).to_bytes(8, "little") + b'{"a": {"dtype": 1}}\n', "malformed"),
        (b"\x80\x04\x95 a pickle", "pickle"),
        (b"PK\x03\x04 as torch.save writes", "pickle"),
    ],
)
def test_a_file_of_weights_whose_header_is_none_is_refused(api: TestClient, content: bytes, says: str) -> None:
    response = put(api, content, name="model.safetensors")
    assert_problem(response, 422, "upload_refused")
    assert says in response.json()["detail"]
    assert_problem(api.get(f"/uploads/{digest(content)}"), 404, "not_found")


def test_weights_are_taken(api: TestClient, tiny_inputs: Path) -> None:
    weights = (tiny_inputs / "checkpoints" / "a" / "model.safetensors").read_bytes()
    assert put(api, weights, name="model.safetensors").status_code == 201
    folder = manifest({"model.safetensors": digest(weights)})
    assert put(api, folder, kind="folder", name=None).status_code == 201
    assert_problem(put(api, manifest({"a.json": digest(weights)}), kind="folder", name=None), 422, "upload_refused")
    assert_problem(put(api, manifest({"a.json": digest(b"")}), kind="folder", name=None), 422, "upload_refused")
    assert_problem(put(api, b"{}", kind="folder", name=None), 422, "upload_refused")
    assert_problem(put(api, folder, kind="folder", name="a.json"), 422, "upload_refused")


def test_an_upload_has_a_limit_of_its_own(api: TestClient) -> None:
    too_long = put(api, b"a", of=b"b", range_=f"bytes 0-0/{MOST + 1}")
    assert_problem(too_long, 413, "too_large")
    assert_problem(put(api, b" " * (MOST + 1), of=b"b"), 413, "too_large")
    assert_problem(put(api, b"a", of=b"b", range_="bytes 0-0/1000000", kind="folder", name=None), 413, "too_large")
    assert_problem(api.post("/merge", json={"name": " " * 2000}), 413, "too_large")
    assert put(api, b" " * MOST).status_code == 201


def test_an_upload_that_the_disk_has_no_room_for_is_refused(api: TestClient, settings: Settings) -> None:
    full = TestClient(create_app(settings.model_copy(update={"min_free_bytes": 2**60})), BASE_URL, client=HERE)
    assert_problem(put(full, ROWS), 507, "no_space")
    assert_problem(full.get(f"/uploads/{digest(ROWS)}"), 404, "not_found")
    assert put(api, ROWS).status_code == 201


def test_an_upload_may_not_grow_beyond_what_its_tenant_may_store(api: TestClient, settings: Settings) -> None:
    limited = TestClient(create_app(settings.model_copy(update={"max_stored_bytes": 100_000})), BASE_URL, client=HERE)
    large = b" " * 100_001
    assert put(limited, b" ", of=large, range_="bytes 0-0/2").status_code == 202  # it is announced as a small one
    assert_problem(put(limited, large), 413, "storage_full")
    assert put(limited, large[:-1]).status_code == 413  # with the two bytes above, which take a block of the disk
    assert limited.delete(f"/uploads/{digest(large)}").status_code == 204
    assert put(limited, large[:-1]).status_code == 201
    assert_problem(put(limited, ROWS), 413, "storage_full")


def test_uploads_that_are_announced_at_once_do_not_pass_the_limit_together(api: TestClient, settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"max_stored_bytes": 100_000}))
    contents = [bytes([65 + index]) for index in range(8)]
    together = Barrier(len(contents))

    def announced(of: bytes) -> int:
        one = TestClient(app, BASE_URL, client=HERE)
        together.wait()
        return put(one, b"", of=of, range_="bytes */60000").status_code

    with ThreadPoolExecutor(len(contents)) as threads:
        statuses = sorted(threads.map(announced, contents))
    assert statuses == [202] + [413] * (len(contents) - 1)


def test_other_tenants_uploads_do_not_exist(api: TestClient, redis: Redis, settings: Settings) -> None:
    keys = ApiKeys(redis, settings.prefix)
    made = {t: keys.create(NewKey(tenant=t, scopes=[Scope.WRITE])).key for t in ("first", "second")}
    first, second = ({"Authorization": f"Bearer {made[tenant]}"} for tenant in ("first", "second"))
    path, params = f"/uploads/{digest(ROWS)}", {"name": "rows.jsonl"}
    assert_problem(api.put(path, content=ROWS, params=params), 401, "unauthenticated")
    assert api.put(path, content=ROWS, params=params, headers=first).status_code == 201
    for answer in (api.get(path, headers=second), api.delete(path, headers=second)):
        assert_problem(answer, 404, "not_found")
    part = {**second, "Content-Range": f"bytes 1-1/{len(ROWS)}"}  # a guess of what is there tells nothing
    answer = api.put(path, content=ROWS[:1], params=params, headers=part)
    assert_problem(answer, 409, "wrong_offset")
    assert answer.headers["Upload-Offset"] == "0"
    folder = manifest({"rows.jsonl": digest(ROWS)})
    of_folder = {"kind": "folder"}
    stolen = api.put(f"/uploads/{digest(folder)}", content=folder, params=of_folder, headers=second)
    assert_problem(stolen, 422, "upload_refused")
    reader = keys.create(NewKey(tenant="second", scopes=[Scope.READ])).key
    refused = api.put(path, content=ROWS, params=params, headers={"Authorization": f"Bearer {reader}"})
    assert_problem(refused, 403, "insufficient_scope")
    assert api.put(path, content=ROWS, params=params, headers=second).status_code == 201
    paths = [uploads_of(settings.data_dir, t) / digest(ROWS) / "content" / "rows.jsonl" for t in ("first", "second")]
    assert paths[0].samefile(paths[1])


def test_unused_uploads_expire(api: TestClient, settings: Settings) -> None:
    put(api, ROWS)
    put(api, b"{", of=b"{}", range_="bytes 0-0/2")
    folders = api.app.state.services.uploads.folders  # type: ignore[attr-defined]
    remove_unused(folders, lambda: (), settings.upload_retention)
    for content in (ROWS, b"{}"):
        assert api.get(f"/uploads/{digest(content)}").status_code == 200
        os.utime(uploads_of(settings.data_dir, "default") / digest(content), (1, 1))
    remove_unused(folders, lambda: (), settings.upload_retention)
    for content in (ROWS, b"{}"):
        assert_problem(api.get(f"/uploads/{digest(content)}"), 404, "not_found")
