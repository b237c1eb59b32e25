"""What the API answers about artifacts that are removed or damaged, with its real server, Redis and folders."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from redis import Redis

from app.contracts.jobs import Stage, TaskId
from app.contracts.settings import Settings
from app.server import Server
from app.storage.artifacts.folder import FolderStore
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from tests.conftest import HANGS_S, RESULT, assert_problem, free_port, wait_until
from worker.__main__ import _is_wanted
from worker.engine.catalog.contracts.report import Candidate, Search, Trial

LARGE = 16 << 20  # more than sockets buffer
FILES = {
    "report.html": b"<p>all is well</p>",
    "models/a/config.json": b"{}",
    "models/a/model.safetensors": bytes(LARGE),
    "models/b/model.safetensors": b"\1" * LARGE,
}


class Api:
    """The API's server in a thread, and jobs that nobody had to work for."""

    def __init__(self, redis: Redis, redis_url: str, data_dir: Path, inputs: Path, **settings: Any) -> None:
        port = free_port()
        configured = Settings(
            redis_url=SecretStr(redis_url),
            data_dir=data_dir,
            local_roots=(inputs,),
            port=port,
            queue="test",
            **settings,
        )
        self.store = JobStore(redis, "test", lease_seconds=10, max_losses=3)
        self.artifacts = FolderStore(data_dir)
        self.data_dir = data_dir
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS_S)
        self._server = Server(configured)
        self._thread = Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server")

    def succeeded(self, files: dict[str, bytes] = FILES, result: Any = RESULT) -> str:
        """A job with an artifact."""
        job = NewJob({"name": "all of it"}, "name", priority=10)  # other tests may have left one that waits
        task = TaskId(job=self.store.records.create(job).job_id, stage=Stage.MERGE)
        attempt = self.store.tasks.claim("worker")
        assert attempt is not None
        assert attempt.task == task
        folder = self.artifacts.begin(attempt)
        entries = []
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            entries.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        (folder / "manifest.json").write_text(json.dumps({"files": entries, "versions": {}}))
        assert self.store.tasks.succeed(attempt, result, self.artifacts.publish(attempt))
        return task.job

    def folder(self, job_id: str) -> Path:
        return self.data_dir / "artifacts" / f"{job_id}.1"

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def running(redis_url: str, data_dir: Path, inputs: Path, **settings: Any) -> Iterator[Api]:
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        api = Api(redis, redis_url, data_dir, inputs, **settings)
        yield api
        api.stop()


@pytest.fixture(scope="module")
def api(redis_url: str, tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Api]:
    with running(redis_url, tmp_path_factory.mktemp("data"), tiny_inputs) as api:
        yield api


def test_a_file_whose_download_has_begun_is_sent_whole_though_its_job_is_deleted(api: Api) -> None:
    job_id = api.succeeded()
    path = f"/jobs/{job_id}/artifacts/models/b/model.safetensors"
    with api.http.stream("GET", path) as response:
        assert response.status_code == 200
        chunks = response.iter_raw(1 << 16)
        found = hashlib.sha256(next(chunks))
        deleted = api.http.delete(f"/jobs/{job_id}")
        assert (deleted.status_code, deleted.headers.get("Content-Type")) == (204, None)
        assert not api.folder(job_id).exists()
        for chunk in chunks:
            found.update(chunk)
    assert found.hexdigest() == hashlib.sha256(FILES["models/b/model.safetensors"]).hexdigest()
    assert_problem(api.http.get(path), 404, "not_found")
    assert api.http.get(path).json()["detail"] == f"job {job_id} was deleted"


def test_an_archive_whose_job_is_deleted_meanwhile_never_looks_whole(api: Api) -> None:
    job_id = api.succeeded()
    with api.http.stream("GET", f"/jobs/{job_id}/archive") as response:
        assert response.status_code == 200
        chunks = response.iter_raw(1 << 16)
        next(chunks)
        assert api.http.delete(f"/jobs/{job_id}").status_code == 204
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
            for _ in chunks:
                pass
    assert_problem(api.http.get(f"/jobs/{job_id}/archive"), 404, "not_found")


def test_an_archive_is_whole(api: Api) -> None:
    job_id = api.succeeded()
    with tarfile.open(fileobj=BytesIO(api.http.get(f"/jobs/{job_id}/archive").content)) as archive:
        assert {entry.name: entry.size for entry in archive} == {
            **{name: len(content) for name, content in FILES.items()},
            "manifest.json": api.folder(job_id).joinpath("manifest.json").stat().st_size,
        }


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [shorten, lengthen, Path.unlink, make_a_folder])
def test_a_file_that_is_not_as_long_as_it_was_is_told_before_anything_is_sent(
    api: Api, damage: Callable[[Path], None]
) -> None:
    job_id = api.succeeded({"report.html": b"<p>", "models/a/config.json": b"{}"})
    damage(api.folder(job_id) / "report.html")
    for part in ("artifacts/report.html", "report", "artifacts", "archive"):
        response = api.http.get(f"/jobs/{job_id}/{part}")
        assert_problem(response, 500, "artifact_damaged")
        assert "report.html" in response.json()["detail"]
        assert str(api.data_dir) not in response.text
        assert api.http.head(f"/jobs/{job_id}/{part}").status_code == 500
    intact = api.http.get(f"/jobs/{job_id}/artifacts/models/a/config.json")
    assert (intact.status_code, intact.content) == (200, b"{}")


MANIFESTS = {
    "none": None,
    "empty": "",
    "no JSON": '{"files": [',
    "not UTF-8": "\udcff",
    "another shape": '{"files": {"a": 1}}',
    "no digest": '{"files": [{"name": "report.html", "bytes": 1, "sha256": "0"}]}',
    "a size below 0": json.dumps({"files": [{"name": "report.html", "bytes": -1, "sha256": "0" * 64}]}),
    "a way out": json.dumps({"files": [{"name": "../../../etc/passwd", "bytes": 1, "sha256": "0" * 64}]}),
    "a root": json.dumps({"files": [{"name": "/etc/passwd", "bytes": 1, "sha256": "0" * 64}]}),
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_a_broken_manifest_is_told_before_anything_is_sent(api: Api, manifest: str | None) -> None:
    job_id = api.succeeded({"report.html": b"x", "models/a/config.json": b"{}"})
    path = api.folder(job_id) / "manifest.json"
    if manifest is None:
        path.unlink()
    else:
        path.write_bytes(manifest.encode(errors="surrogateescape"))
    for part in ("artifacts", "artifacts/report.html", "artifacts/manifest.json", "report", "archive"):
        response = api.http.get(f"/jobs/{job_id}/{part}")
        assert_problem(response, 500, "artifact_damaged")
        assert "manifest.json is missing or broken" in response.json()["detail"]
    recipe = {"method": {"name": "average"}, "models": [{"name": "a", "checkpoint": f"job:{job_id}/a"}]}
    refused = api.http.post("/merge/validate", json=recipe)
    assert refused.status_code == 422
    assert f"the artifact of job {job_id} is damaged" in refused.json()["detail"]


def test_a_model_that_is_not_all_there_is_no_checkpoint(api: Api) -> None:
    job_id = api.succeeded({"models/a/config.json": b"{}", "models/a/model.safetensors": b"12345678"})
    shorten(api.folder(job_id) / "models/a/model.safetensors")
    recipe = {"method": {"name": "average"}, "models": [{"name": "a", "checkpoint": f"job:{job_id}/a"}]}
    refused = api.http.post("/merge", json=recipe)
    assert_problem(refused, 422, "invalid_request")
    assert "models/a/model.safetensors has 7 bytes instead of 8" in refused.json()["detail"]


def test_an_artifact_that_is_gone_is_told_as_such(api: Api) -> None:
    job_id = api.succeeded({"report.html": b"x"})
    api.folder(job_id).rename(api.data_dir / "elsewhere")
    for part in ("artifacts", "artifacts/report.html", "report", "archive"):
        response = api.http.get(f"/jobs/{job_id}/{part}")
        assert_problem(response, 404, "not_found")
        assert "is gone from its storage" in response.json()["detail"]


def test_a_second_removal_says_that_there_was_one(api: Api) -> None:
    job_id = api.succeeded({"report.html": b"x"})
    assert api.http.delete(f"/jobs/{job_id}").status_code == 204
    for method in ("DELETE", "GET"):
        response = api.http.request(method, f"/jobs/{job_id}")
        assert_problem(response, 404, "not_found")
        assert response.json()["detail"] == f"job {job_id} was deleted"
    assert api.http.delete(f"/jobs/{'0' * 28}").json()["detail"] == f"there is no job {'0' * 28}"


def test_a_job_that_was_kept_for_its_time_is_removed_with_its_artifact(
    redis_url: str, tmp_path: Path, tiny_inputs: Path
) -> None:
    with running(redis_url, tmp_path, tiny_inputs, job_retention="0.5s") as api:
        job_id = api.succeeded({"report.html": b"x"})
        wait_until(lambda: not api.folder(job_id).exists(), "its removal")
        response = api.http.get(f"/jobs/{job_id}")
        assert_problem(response, 404, "not_found")
        assert response.json()["detail"] == f"job {job_id} was kept for its time and is removed"
        assert job_id not in api.http.get("/jobs").text


def test_what_a_crash_leaves_of_a_removed_job_is_nobodys_and_what_of_an_unknown_one_is_kept(
    redis: Redis, tmp_path: Path
) -> None:
    store, artifacts = JobStore(redis, "test", lease_seconds=10, max_losses=3), FolderStore(tmp_path)
    artifacts.prepare()
    folders = []
    for _ in range(3):
        task = TaskId(job=store.records.create(NewJob({}, "name")).job_id, stage=Stage.MERGE)
        attempt = store.tasks.claim("worker")
        assert attempt is not None
        artifacts.begin(attempt)
        store.tasks.succeed(attempt, RESULT, artifacts.publish(attempt))
        folders.append(tmp_path / "artifacts" / f"{task.job}.1")
    removed, kept, unknown = folders
    store.records.delete(removed.name.partition(".")[0])  # and then the process is killed
    redis.delete(*redis.keys(f"test:*{unknown.name.partition('.')[0]}*"))
    assert artifacts.sweep(lambda *found: _is_wanted(store, *found)) == 1
    assert [folder.exists() for folder in (removed, kept, unknown)] == [False, True, True]


def test_a_list_of_jobs_has_neither_requests_nor_candidates_nor_trials(api: Api) -> None:
    candidate = Candidate(
        name="average", kind="method", method={}, weights={}, align_ridge=None, trial=0, metrics={}, mean_retention=1.0,
        min_retention=1.0, behind=None, chosen=True,
    )  # fmt: skip
    trial = Trial(
        number=0, candidate="average", parameters={}, seconds=1, rows=1, retentions={}, smoothed={}, objective=1,
        pruned=False,
    )  # fmt: skip
    search = Search(
        objective="mean_retention", search_rows={}, held_out_rows={}, min_retention={}, feasible=True, chosen=0,
        trials=[trial], failed=[],
    )  # fmt: skip
    result = RESULT.model_copy(update={"candidates": [candidate], "search": search, "notes": ["a note"]})
    job_id = api.succeeded({"report.html": b"x"}, result)
    whole = api.http.get(f"/jobs/{job_id}").json()
    short = next(job for job in api.http.get("/jobs").json()["data"] if job["id"] == job_id)
    assert whole["request"] == {"name": "all of it"}
    assert len(whole["result"]["candidates"]) == len(whole["result"]["search"]["trials"]) == 1
    of_one_job = ("request", "waiting_for")
    assert short == {
        **{name: value for name, value in whole.items() if name not in of_one_job},
        "result": {n: v for n, v in whole["result"].items() if n not in ("candidates", "search")},
    }
    ended, expires = (datetime.fromisoformat(whole[name]) for name in ("finished_at", "expires_at"))
    assert expires - ended == timedelta(days=90)
