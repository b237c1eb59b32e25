"""A release goes on with the folder of the one before it, a copy of a stopped folder is a backup, and what a newer
release has written is refused by every process that would open it."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from redis import Redis

from app.cli.exits import Exit
from app.embedded_redis import EmbeddedRedis, wait_for
from app.storage.keys import Keys
from app.storage.versions import FORMAT, MARK, NEWER_DATA_STATUS, check_folder
from tests.conftest import REPOSITORY, Service, free_port, tiny_recipe, wait_until
from worker.engine.runtime.device import resolve_precision

RELEASE = REPOSITORY / "tests" / "data" / "release_1b95f83.tar.xz"
NEWER = json.dumps({"format": FORMAT + 1, "release": "9.9.9"})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """This release, on the folder of the one before."""
    root = tmp_path_factory.mktemp("release")
    with tarfile.open(RELEASE) as archive:
        archive.extractall(root, filter="data")
    assert check_folder(root / "data") < FORMAT
    service = Service(root / "data", root / "inputs", free_port(), key=(root / "key.txt").read_text())
    service.start()
    yield service
    if service.process is not None and service.process.poll() is None:
        service.stop()


def jobs(service: Service) -> dict[str, dict[str, Any]]:
    return {job["name"]: job for job in service.get("/jobs").json()["data"]}


def artifact(service: Service, job: Mapping[str, Any]) -> dict[str, bytes]:
    listing = service.get(f"/jobs/{job['id']}/artifacts").json()
    return {file["name"]: service.get(file["href"]).content for file in listing["files"]}


def test_the_folder_of_the_release_before_is_gone_on_with(service: Service) -> None:
    found = jobs(service)
    assert {"measured", "a+b", "late", "waiting"} == found.keys()
    waiting = service.finished(found["waiting"]["id"])
    assert waiting["status"] == "succeeded", waiting["error"]
    in_float32 = resolve_precision("auto", torch.device("cpu")) == "float32"  # as the folder's statistics are
    assert waiting["result"]["models"][1]["score_cached"] == in_float32
    measured = service.job(found["measured"]["id"])
    assert measured["result"]["metrics"]["a"]["metric"] == "accuracy"
    assert measured["labels"] == {"team": "search"}
    manifest = json.loads(artifact(service, measured)["manifest.json"])
    assert {file["name"] for file in manifest["files"]} < artifact(service, measured).keys()
    assert service.job(found["late"]["id"])["error"]["code"] == "timeout"
    with service.http as http:  # the name is remembered
        repeated = http.put("/merge/nightly", json={**tiny_recipe("a", "b", name="average"), "evaluate": False})
    assert (repeated.status_code, repeated.json()["id"]) == (200, found["a+b"]["id"])
    assert service.post(f"/jobs/{found['late']['id']}/retry").status_code == 202
    assert check_folder(service.data_dir) == FORMAT


@pytest.mark.long
def test_a_copy_of_a_stopped_folder_is_a_backup(service: Service, tmp_path: Path) -> None:
    done = {name: service.finished(job["id"]) for name, job in jobs(service).items()}
    files = {name: artifact(service, job) for name, job in done.items() if job["status"] == "succeeded"}
    events = service.get(f"/jobs/{done['measured']['id']}/events").text
    job_id, _ = service.submit_held({**tiny_recipe("a", "b"), "name": "of the backup"})
    assert service.stop() == 0
    copy = tmp_path / "elsewhere" / "data"
    shutil.copytree(service.data_dir, copy, symlinks=True)
    shutil.rmtree(service.data_dir)
    restored = Service(copy, service.inputs, free_port(), key=service.key)
    restored.start()
    try:
        finished = restored.finished(job_id)
        assert finished["status"] == "succeeded", finished["error"]
        assert {name: restored.job(job["id"]) for name, job in done.items()} == done
        assert {name: artifact(restored, done[name]) for name in files} == files
        assert restored.get(f"/jobs/{done['measured']['id']}/events").text == events
    finally:
        assert restored.stop() == 0


def refusal(*command: str, **environment: str) -> str:
    """What a process says that must refuse to open what a newer release has written."""
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == NEWER_DATA_STATUS, ended.stderr
    assert "9.9.9" in ended.stderr
    assert f"form {FORMAT + 1}" in ended.stderr
    return ended.stderr


def test_every_process_refuses_a_newer_folder(tmp_path: Path, redis_url: str) -> None:
    (tmp_path / MARK).write_text(NEWER)
    folder, port = ("--data-dir", str(tmp_path)), str(free_port())
    with_redis = {"MASKMERGE_REDIS_URL": redis_url, "MASKMERGE_DATA_DIR": str(tmp_path), "MASKMERGE_QUEUE": "newer"}
    assert Exit.NEWER_DATA == NEWER_DATA_STATUS
    assert "restore a backup" in refusal("app.cli", "serve", "--port", port, *folder)
    refusal("app.cli", "api", "--port", port, **with_redis)
    refusal("worker", **with_redis)
    refusal("app.cli", "keys", "list", *folder)
    assert sorted(os.listdir(tmp_path)) == ["artifacts", MARK, "lock", "work"]  # no Redis was begun
    assert (tmp_path / MARK).read_text() == NEWER


@pytest.mark.long
def test_every_process_refuses_a_newer_redis(tmp_path: Path, redis: Redis, redis_url: str) -> None:
    redis.set(Keys("newer").format, NEWER)
    port = str(free_port())
    with_redis = {"MASKMERGE_REDIS_URL": redis_url, "MASKMERGE_DATA_DIR": str(tmp_path), "MASKMERGE_QUEUE": "newer"}
    refusal("app.cli", "api", "--port", port, **with_redis)
    refusal("app.cli", "serve", "--port", port, **with_redis)
    refusal("worker", **with_redis)
    refusal("app.cli", "keys", "create", **with_redis)
    assert redis.get(Keys("newer").format) == NEWER
    assert redis.keys("newer:*") == [Keys("newer").format]


@pytest.mark.long
def test_the_api_ends_when_a_newer_redis_comes_back(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    late = EmbeddedRedis(tmp_path / "redis")

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(late.command, stdout=subprocess.DEVNULL)
        wait_for(late, process)
        return process

    process = started()
    with Redis.from_url(late.url) as client:
        client.set(Keys("newer").format, NEWER)
    process.terminate()
    process.wait()
    port = free_port()
    settings = {"MASKMERGE_REDIS_URL": late.url, "MASKMERGE_DATA_DIR": str(tmp_path), "MASKMERGE_QUEUE": "newer"}
    command = [sys.executable, "-m", "app.cli", "api", "--port", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, **settings}, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    ) as api:
        wait_until(lambda: answers(port), "the API to start without Redis")
        process = started()
        _, said = api.communicate(timeout=60)
    process.terminate()
    process.wait()
    late.clean()
    assert api.returncode == NEWER_DATA_STATUS, said
    assert "9.9.9" in said


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("mark", ["", "{}", "3", '{"format": "x", "release": "1"}'])
def test_a_mark_that_cannot_be_read_is_no_older_form(tmp_path: Path, mark: str) -> None:
    (tmp_path / MARK).write_text(mark)
    with pytest.raises(ValueError, match="restore a backup"):
        check_folder(tmp_path)
