"""Artifacts are published, read, downloaded and removed alike in a folder and in object storage."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from app.api.conditional import Preconditions
from app.api.files import held_open, serve
from app.contracts.jobs import Attempt, Stage, TaskId
from app.contracts.object_storage import ObjectStorage
from app.storage.artifacts import open_artifacts
from app.storage.artifacts.store import ArtifactStore
from app.storage.files import Damaged
from app.storage.objects.bucket import Patience
from app.storage.objects.errors import StorageAway
from tests.conftest import wait_until
from tests.object_storage.server import PROGRAMS, ObjectServer, set_keys
from tests.tiny import tiny_checkpoint

JOB = "1" * 28
LARGE = bytes(range(256)) * (1 << 17)
"""32 MiB: three parts."""


class Stopped(Exception):
    pass


@pytest.fixture(scope="module", params=PROGRAMS)
def server(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    with PROGRAMS[request.param]() as server:
        server.make("artifacts")
        yield server


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    set_keys(monkeypatch)


def attempt(number: int = 1) -> Attempt:
    return Attempt(task=TaskId(job=JOB, stage=Stage.MERGE), number=number)


def assembled(store: ArtifactStore, number: int = 1) -> Path:
    """An attempt's folder with two models that share a shard."""
    folder = store.begin(attempt(number))
    tiny_checkpoint(folder / "models" / "a")
    (folder / "models" / "b").mkdir()
    for path in (folder / "models" / "a").iterdir():
        os.link(path, folder / "models" / "b" / path.name)
    (folder / "scores").mkdir()
    (folder / "scores" / "a.safetensors").write_bytes(LARGE)
    files = [
        {
            "name": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


@dataclass
class Place:
    store: ArtifactStore
    server: ObjectServer | None

    def visible(self) -> list[str]:
        return self.server.keys("artifacts") if self.server else []


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: ObjectServer) -> Iterator[Place]:
    is_folder = request.param == "folder"
    settings = ObjectStorage(endpoint=server.proxy.url)
    store = open_artifacts("folder" if is_folder else "s3:artifacts/own", tmp_path, settings)
    store.prepare()
    yield Place(store, None if is_folder else server)
    server.proxy.heal()
    store.remove(f"{JOB}.1")
    store.remove(f"{JOB}.2")


def test_an_artifact_is_published_read_and_removed(place: Place) -> None:
    store = place.store
    assert store.is_writable()
    folder = assembled(store)
    contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(FileNotFoundError):
        _ = store.open(f"{JOB}.1").files
    told: list[tuple[int, int]] = []
    name = store.publish(attempt(), lambda done, total: told.append((done, total)))
    assert (name, folder.exists()) == (f"{JOB}.1", False)
    assert all(done == total for done, total in told[-1:])
    artifact = store.open(name)
    assert [file.name for file in artifact.files][-1] == "manifest.json"
    for file in artifact.files:
        file.check()
        with file.open() as stream:
            assert stream.read() == contents[file.name], file.name
            stream.seek(1)
            assert stream.read(3) == contents[file.name][1:4]
    assert list(artifact.models) == ["a", "b"]
    for model in "ab":
        with artifact.inspect(model) as outline, ExitStack() as held:
            assert (outline.path / "config.json").read_bytes() == contents[f"models/{model}/config.json"]
            size = len(contents[f"models/{model}/model.safetensors"])
            assert (outline.path / "model.safetensors").stat().st_size == size
            fetched = artifact.fetch(model, lambda *_: None, held)
            for path in fetched.path.iterdir():
                assert path.read_bytes() == contents[f"models/{model}/{path.name}"]
    if place.server:  # what two models share is there once
        assert not any("/models/b/" in key for key in place.visible())
        assert not place.server.has_unfinished("artifacts")
    assert store.sweep(lambda task, number, published: published) == 0
    assert store.open(name).files
    store.remove(name)
    with pytest.raises(FileNotFoundError):
        _ = store.open(name).files
    assert place.visible() == []


def test_what_crashes_and_cancels_leave_is_never_seen_and_goes(place: Place) -> None:
    store = place.store
    assembled(store)

    def stop(done: int, total: int) -> None:
        if done > len(LARGE) // 2:
            raise Stopped

    if place.server:
        with pytest.raises(Stopped):
            store.publish(attempt(), stop)
        assert not place.server.has_unfinished("artifacts")
        assert place.visible()
        assert not any(key.endswith("manifest.json") for key in place.visible())
        with pytest.raises(FileNotFoundError):
            _ = store.open(f"{JOB}.1").files
    wanted: list[tuple[str, int, bool]] = []

    def is_wanted(task: TaskId, number: int, published: bool) -> bool:
        wanted.append((task.job, number, published))
        return True

    assert store.sweep(is_wanted) == 0
    assert set(wanted) == {(JOB, 1, False), *([(JOB, 1, True)] if place.server else [])}
    store.discard(attempt())
    assert place.visible() == []
    assembled(store)
    store.publish(attempt(), lambda *_: None)
    assembled(store, 2)
    assert place.visible() == []
    store.publish(attempt(2), lambda *_: None)
    assert store.sweep(lambda task, number, published: False) == 1
    assert place.visible() == []


def test_a_file_that_is_gone_or_shorter_is_damage(place: Place, tmp_path: Path) -> None:
    store = place.store
    assembled(store)
    store.publish(attempt(), lambda *_: None)
    if place.server:
        prefix = f"own/artifacts/{JOB}/1/models/a"
        place.server.client.delete_object(Bucket="artifacts", Key=f"{prefix}/config.json")
        place.server.client.put_object(Bucket="artifacts", Key=f"{prefix}/model.safetensors", Body=b"short")
    else:
        model = tmp_path / "artifacts" / f"{JOB}.1" / "models" / "a"
        (model / "config.json").unlink()
        (model / "model.safetensors").unlink()
        (model / "model.safetensors").write_bytes(b"short")
    files = {file.name: file for file in store.open(f"{JOB}.1").files}
    with pytest.raises(Damaged, match=r"models/a/config\.json is missing"):
        files["models/a/config.json"].check()
    with pytest.raises(Damaged, match=r"model\.safetensors has 5 bytes instead of"):
        files["models/a/model.safetensors"].open()
    with pytest.raises(Damaged), ExitStack() as held:
        store.open(f"{JOB}.1").fetch("a", lambda *_: None, held)


@pytest.mark.parametrize("signed", [900, 0])
def test_large_files_are_downloaded_from_a_signed_url_or_passed_on(
    server: ObjectServer, tmp_path: Path, signed: int
) -> None:
    settings = ObjectStorage(endpoint=server.proxy.url, public_endpoint=server.url, signed_seconds=signed)
    store = open_artifacts("s3:artifacts", tmp_path, settings)
    store.prepare()
    assembled(store)
    name = store.publish(attempt(), lambda *_: None)
    files = {file.name: file for file in store.open(name).files}
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "HEAD"])
    def get(path: str, request: Request) -> object:
        known = Preconditions(None, [request.headers["if-none-match"]], None, None)
        known = known if request.headers["if-none-match"] != "none" else Preconditions(None, None, None, None)
        return serve(*held_open(files[path]), known, redirects=request.method == "GET")

    client = TestClient(app, headers={"If-None-Match": "none"}, follow_redirects=False)
    etag = f'"{hashlib.sha256(LARGE).hexdigest()}"'
    answer = client.get("/scores/a.safetensors")
    if signed:
        assert answer.status_code == 307
        assert answer.headers["cache-control"] == "no-store"
        location = answer.headers["location"]
        assert location.startswith(server.url)
        assert httpx.get(location).content == LARGE
        part = httpx.get(location, headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content) == (206, LARGE[5:10])
    else:
        assert (answer.status_code, answer.headers["etag"]) == (200, etag)
        assert answer.content == LARGE
    head = client.head("/scores/a.safetensors")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(LARGE)), b"")
    assert client.get("/scores/a.safetensors", headers={"If-None-Match": etag}).status_code == 304
    small = client.get("/models/b/config.json", headers={"Range": "bytes=1-3"})
    assert (small.status_code, small.content) == (206, files["models/b/config.json"].open().read()[1:4])
    assert small.headers["content-range"].startswith("bytes 1-3/")
    assert client.get("/models/b/config.json").headers["content-type"] == "application/json"
    store.remove(name)


def test_a_bucket_that_fails_a_few_times_is_asked_again_and_one_that_stalls_is_given_up(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_artifacts("s3:artifacts", tmp_path, ObjectStorage(endpoint=server.proxy.url))
    store.prepare()
    assembled(store)
    server.proxy.failures = 3
    name = store.publish(attempt(), lambda *_: None)
    assert server.proxy.failures == 0
    assert len(store.open(name).files) > 4
    store.remove(name)
    assembled(store)
    impatient = Patience(request_s=0.5, retries=1, total_s=1)
    for patience in ("AT_WORK", "IN_PASSING", "AT_THE_DOOR"):
        monkeypatch.setattr(f"app.storage.artifacts.s3.{patience}", impatient)
    server.proxy.is_stalled = True
    with pytest.raises(StorageAway, match=r"bucket artifacts \(artifacts/1.*\) does not answer in time"):
        store.publish(attempt(), lambda *_: None)
    store.discard(attempt())  # it is left to a sweep
    stalled = open_artifacts("s3:artifacts", tmp_path, ObjectStorage(endpoint=server.proxy.url))
    assert not stalled.is_writable()
    assert not (tmp_path / "work" / f"{JOB}.1").exists()
    server.proxy.heal()
    assert not any(key.endswith("manifest.json") for key in server.keys("artifacts"))

    def is_swept() -> bool:  # what was held back arrives late, as after a cut of the network
        store.sweep(lambda task, number, published: False)
        return server.keys("artifacts") == []

    wait_until(is_swept, "nothing to be left")
