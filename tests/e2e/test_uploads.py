"""Uploads at the real service: processes killed in the middle, several senders at once, and jobs that read them."""

import asyncio
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import AsyncClient, Client, UploadFailed
from app.contracts.uploads import manifest
from tests.conftest import REPOSITORY, Service, assert_problem, make_service, tiny_recipe, wait_until

BIG = 30_000_000
REQUEST_S = 2
KEPT_S = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("uploads")
    service = make_service(
        root, tiny_inputs, MASKMERGE_REQUEST_SECONDS=str(REQUEST_S), MASKMERGE_UPLOAD_RETENTION=str(KEPT_S)
    )
    service.start()
    yield service
    assert service.stop() == 0


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(service: Service, content: bytes, first: int = 0, last: int | None = None, **params: str) -> httpx.Response:
    last = len(content) - 1 if last is None else last
    headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if content else {}
    with service.http as http:
        return http.put(
            f"/uploads/{digest(content)}", content=content[first : last + 1], params=params, headers=headers
        )


def upload(service: Service, path: Path) -> str:
    """The reference of a file or a folder that is uploaded."""
    if path.is_file():
        response = put(service, path.read_bytes(), name=path.name)
    else:
        files = {}
        for file in sorted(path.iterdir()):
            files[file.name] = upload(service, file).removeprefix("upload:")
        response = put(service, manifest(files), kind="folder")
    assert response.status_code in (200, 201), response.text
    reference: str = response.json()["reference"]
    return reference


def begun(service: Service, content: bytes, sent: int) -> http.client.HTTPConnection:
    """A request for a whole upload of which only the first bytes were sent."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.putrequest("PUT", f"/uploads/{digest(content)}?name=rows.jsonl")
    connection.putheader("Content-Length", str(len(content)))
    connection.endheaders()
    connection.send(content[:sent])
    return connection


def offset(service: Service, content: bytes) -> int:
    response = service.get_or_none(f"/uploads/{digest(content)}")
    return int(response.headers["Upload-Offset"]) if response else 0


@pytest.mark.long
def test_an_upload_goes_on_after_the_api_was_killed_in_the_middle(served: Service) -> None:
    content = os.urandom(BIG)
    connection = begun(served, content, 2 * BIG // 3)
    wait_until(lambda: offset(served, content) > BIG // 2, "most of it to be written")
    before = served.processes()["api"]
    before.kill()
    before.wait()
    connection.close()
    served.wait_ready()
    there = offset(served, content)
    assert BIG // 2 < there < BIG
    assert_problem(put(served, content, there - 1, name="rows.jsonl"), 409, "wrong_offset")
    assert put(served, content, there, there + 999, name="rows.jsonl").status_code == 202
    assert put(served, content, there + 1000, name="rows.jsonl").status_code == 201
    stored = served.data_dir / "uploads" / digest(content) / "content" / "rows.jsonl"
    assert stored.read_bytes() == content


def test_an_upload_may_take_longer_than_other_requests_but_may_not_stop(served: Service) -> None:
    content = os.urandom(4_000_000)
    connection, began = begun(served, content, 0), time.monotonic()
    for first in range(0, len(content), 400_000):  # 1 MB takes 1 s
        time.sleep(0.4)
        connection.send(content[first : first + 400_000])
    assert connection.getresponse().status == 201
    assert time.monotonic() - began > REQUEST_S
    connection.close()
    stopped = begun(served, content + b"x", 1000)
    assert stopped.getresponse().status == 408
    assert offset(served, content + b"x") == 1000  # what came before is kept
    stopped.close()


def test_of_several_that_send_the_same_at_once_one_is_taken(served: Service) -> None:
    content = os.urandom(BIG)
    answers: list[httpx.Response] = []

    def send() -> None:
        while True:
            try:
                answers.append(put(served, content, name="rows.jsonl"))
            except httpx.TransportError:  # it was refused before all of it was sent
                continue
            if answers[-1].status_code in (200, 201):
                return

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(201) == 1
    assert {*statuses} <= {200, 201, 409}
    stored = served.data_dir / "uploads" / digest(content) / "content" / "rows.jsonl"
    assert stored.read_bytes() == content


def artifact(service: Service, job: dict[str, Any]) -> dict[str, str]:
    """The sha256 of every file of an artifact that does not tell of times or inputs' names."""
    files = service.get(f"/jobs/{job['id']}/artifacts").json()["files"]
    telling = ("report.json", "report.html", "manifest.json", "recipe.json", "README.md", "provenance.json")
    return {file["name"]: file["sha256"] for file in files if file["name"] not in telling}


def test_a_merge_of_uploads_is_the_merge_of_the_same_local_files(served: Service) -> None:
    local = tiny_recipe("a", "b")
    first = served.finished(served.submit(local))
    assert first["status"] == "succeeded", first["error"]
    remote = json.loads(json.dumps(local))
    for model in remote["models"]:
        for part, key in ((model, "checkpoint"), (model["dataset"], "source"), (model["evaluation"], "source")):
            part[key] = upload(served, served.inputs / part[key].removeprefix("local:"))
    second = served.finished(served.submit(remote))
    assert second["status"] == "succeeded", second["error"]
    assert artifact(served, second) == artifact(served, first)
    assert len(artifact(served, second)) > 4
    assert [model["score_cached"] for model in second["result"]["models"]] == [True, True]
    assert second["result"]["metrics"] == first["result"]["metrics"]
    assert second["request"]["models"][0]["checkpoint"] == remote["models"][0]["checkpoint"]


def test_what_a_recipe_may_not_name(served: Service) -> None:
    rows = upload(served, served.inputs / "rows" / "a.jsonl")
    folder = upload(served, served.inputs / "checkpoints" / "a")
    part = b"only a part of it"
    put(served, part, 0, 3, name="rows.jsonl")

    def refused(change: Callable[[dict[str, Any]], object]) -> str:
        recipe = tiny_recipe("a", "b")
        change(recipe["models"][1])
        response = served.post("/merge", json=recipe)
        assert_problem(response, 422, "invalid_request")
        [error] = response.json()["errors"]
        return f"{error['field']}: {error['message']}"

    assert "one file, a.jsonl" in refused(lambda model: model.update(checkpoint=rows))
    assert "is a folder" in refused(lambda model: model["dataset"].update(source=folder))
    assert "no such upload" in refused(lambda model: model.update(checkpoint=f"upload:{'0' * 64}"))
    assert f"4 of {len(part)} bytes" in refused(lambda model: model["dataset"].update(source=f"upload:{digest(part)}"))
    assert "write upload:SHA256" in refused(lambda model: model.update(checkpoint="upload:../../etc"))


def test_a_job_that_waits_or_runs_holds_what_it_reads(served: Service) -> None:
    recipe = tiny_recipe("a", "b", name="average")
    recipe["evaluate"] = False
    reference = upload(served, served.inputs / "checkpoints" / "a")
    recipe["models"][0]["checkpoint"] = reference
    folder = served.data_dir / "uploads" / reference.removeprefix("upload:")
    idle = served.data_dir / "uploads" / upload(served, served.inputs / "rows" / "b.jsonl").removeprefix("upload:")
    job_id, engine = served.submit_held(recipe)
    try:
        with served.http as http:
            assert_problem(http.delete(f"/uploads/{folder.name}"), 409, "conflict")
        for path in (folder, idle):
            os.utime(path, (1, 1))
        wait_until(lambda: not idle.exists(), "what no job reads to be removed")
        wait_until(lambda: folder.stat().st_mtime > 1, "what a job reads to be renewed")
    finally:
        engine.resume()
    job = served.finished(job_id)
    assert job["status"] == "succeeded", job["error"]
    with served.http as http:
        assert http.delete(f"/uploads/{folder.name}").status_code == 204
    again = served.post("/merge", json=job["request"])
    assert_problem(again, 422, "invalid_request")


@pytest.mark.parametrize("is_async", [False, True])
def test_the_client_sends_what_is_missing(served: Service, tmp_path: Path, is_async: bool) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(served.inputs / "checkpoints" / "grade", folder)
    (folder / "1_Module").mkdir()
    (folder / "1_Module" / "config.json").write_text(f'{{"of": {json.dumps(is_async)}}}')
    shutil.copytree(served.inputs / "checkpoints" / "a", folder / "checkpoint-500")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04\x95 left out")
    big = os.urandom(9_000_000)  # more than one part
    (folder / "big.txt").write_bytes(b"text " + big)
    expected = [path for path in (*folder.glob("*.*"), folder / "1_Module" / "config.json") if path.suffix != ".pt"]
    told: list[tuple[int, int]] = []

    def send() -> str:
        if not is_async:
            with Client(served.url) as client:
                return client.upload(folder, on_bytes=lambda there, total: told.append((there, total)))

        async def wait() -> str:
            async with AsyncClient(served.url) as client:
                return await client.upload(folder, on_bytes=lambda there, total: told.append((there, total)))

        return asyncio.run(wait())

    put(served, b"text " + big, 0, 999, name="big.txt")  # a call before that was cut
    reference = send()
    sizes = {path.read_bytes(): path.stat().st_size for path in expected}
    assert told[-1] == (sum(sizes.values()), sum(sizes.values()))
    first = (folder / "1_Module" / "config.json").stat().st_size  # sent before the file that was cut
    assert {first, first + 1000, first + 8_001_000} < {there for there, _ in told}, "it did not go on where it was cut"
    assert [there for there, _ in told] == sorted(there for there, _ in told)
    stored = served.data_dir / "uploads" / reference.removeprefix("upload:") / "content"
    names = {str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(folder)) for path in expected}
    assert (stored / "big.txt").read_bytes() == b"text " + big
    told.clear()
    assert send() == reference
    assert told == [(sum(sizes.values()), sum(sizes.values()))]
    with Client(served.url) as client:
        for nothing in (tmp_path / "nothing", folder / "optimizer.pt", tmp_path):
            with pytest.raises(UploadFailed):
                client.upload(nothing)


def test_a_recipe_with_paths_of_another_machine_is_submitted(served: Service, tmp_path: Path) -> None:
    recipe = tiny_recipe("a", "b", name="average")
    for model in recipe["models"]:
        shutil.copytree(served.inputs / "checkpoints" / model["name"], tmp_path / model["name"])
        shutil.copy(served.inputs / "rows" / f"{model['name']}.jsonl", tmp_path)
        rows = str(tmp_path / f"{model['name']}.jsonl")
        model["checkpoint"], model["dataset"]["source"] = str(tmp_path / model["name"]), rows
        model["evaluation"]["source"] = rows
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "app.cli", "submit", str(tmp_path / "recipe.json"), "--url", served.url, "--json"]
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "--upload to send it" in refused.stderr
    done = subprocess.run([*command, "--upload"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    job = served.finished(json.loads(done.stdout)["id"])
    assert job["status"] == "succeeded", job["error"]
    sources = [
        source for model in job["request"]["models"] for source in (model["checkpoint"], model["dataset"]["source"])
    ]
    assert all(source.startswith("upload:") for source in sources)
