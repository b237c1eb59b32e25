"""One job's scoring on two workers, which share a folder or a bucket: the bits of one process, whoever is killed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load, load_file

from app.client import Client, LogEntry, Progress
from app.contracts.lifetime import die_with_parent
from app.embedded_redis import opened
from tests.conftest import (
    HANGS_S,
    REPOSITORY,
    Service,
    make_service,
    measured_anew,
    running,
    tiny_recipe,
    wait_until,
)
from tests.object_storage.server import KEYS, moto
from tests.tiny import merge_spec, model_spec, silent, write_rows
from worker.engine.catalog.contracts.spec import ModelSpec
from worker.engine.jobs.engine import Engine

ROWS = 1500
WORKERS = 2


SETTINGS = {"SHARD_SECONDS": "0.3", "THREADS": "1", "LEASE_SECONDS": "2"}


def variables(settings: dict[str, str]) -> dict[str, str]:
    return {f"MASKMERGE_{name}": value for name, value in settings.items()}


@pytest.fixture(scope="module", autouse=True)
def rows(tiny_inputs: Path) -> None:
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"shared-{name}.jsonl", count=ROWS, labels=labels, seed=seed)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path, rows: None) -> Iterator[Service]:
    service = make_service(tmp_path_factory.mktemp("fan-out"), tiny_inputs, **variables(SETTINGS))
    service.start(WORKERS)
    yield service
    assert service.stop() == 0


def recipe() -> dict[str, Any]:
    asked = tiny_recipe("a", "b", examples=ROWS, precision="float32")
    for model in asked["models"]:
        model["dataset"]["source"] = f"local:rows/shared-{model['name']}.jsonl"
        del model["evaluation"]
    return measured_anew({**asked, "output": {"align_heads": False}})


def is_cut(service: Service, job_id: str) -> bool:
    """Whether shards have gone through rows, beyond those of before the cut."""
    job, log = service.job(job_id), service.get(f"/jobs/{job_id}/log").text
    assert job["finished_at"] is None, job
    return "scoring_cut" in log and job["progress"]["done"] > 0


def workers(service: Service) -> list[psutil.Process]:
    """The workers that have an engine."""
    assert service.process is not None
    found = running(psutil.Process(service.process.pid))
    engines = [engine for engine, words in found if "worker.engine_process" in words]
    return [worker for engine in engines if (worker := engine.parent()) is not None]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scores_of_one_process(inputs: Path, asked: dict[str, Any], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    models: list[ModelSpec] = []
    for model in asked["models"]:
        name, dataset = model["name"], model["dataset"]
        spec = model_spec(inputs / "checkpoints" / name, inputs / "rows" / f"shared-{name}.jsonl")
        rows = spec.dataset.model_copy(update={"seed": dataset["seed"]}) if spec.dataset else None
        models.append(spec.model_copy(update={"dataset": rows, "evaluation": None}))
    Engine().merge(merge_spec(folder, models, {"examples": ROWS}), silent)
    return {name: load_file(folder / "scores" / f"{name}.safetensors") for name in ("a", "b")}


@pytest.mark.usefixtures("one_thread")
def test_a_job_on_two_workers_of_which_one_is_killed_has_the_bits_of_one_process(
    service: Service, tiny_inputs: Path, tmp_path: Path
) -> None:
    wait_until(lambda: len(workers(service)) == WORKERS, "all workers to have an engine")
    asked = recipe()
    job_id = service.submit(asked)
    wait_until(lambda: is_cut(service, job_id), "shards to run", interval_s=0.02)
    workers(service)[0].kill()
    job = service.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job["error"]
    assert [model["score_cached"] for model in job["result"]["models"]] == [False, False]
    assert all(model["score_seconds"] > 0 for model in job["result"]["models"])
    with Client(service.url, timeout_s=HANGS_S) as client:
        events = [event.data for event in client.events(job_id)]
    logged = [event for event in events if isinstance(event, LogEntry)]
    codes = [event.code.value for event in logged]
    assert (codes.count("scoring_cut"), codes.count("shards_done"), codes.count("attempt_started")) == (1, 1, 1)
    lost = [event.message for event in logged if event.code == "attempt_lost"]
    assert len(lost) == 1  # the killed worker had one shard in hand
    assert lost[0].startswith("shard ")
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    assert fractions == sorted(fractions)
    assert_as_alone(service, job_id, scores_of_one_process(tiny_inputs, asked, tmp_path / "alone"))


def assert_as_alone(service: Service, job_id: str, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in expected.items():
        found = load(service.get(f"/jobs/{job_id}/artifacts/scores/{name}.safetensors").content)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], of) for key, of in tensors.items()), name


@contextmanager
def another_machine(folder: Path, service: Service) -> Iterator[Path]:
    """A worker with a data folder of its own, and its log."""
    folder.mkdir()
    own = variables({"DATA_DIR": str(folder / "data"), "LOCAL_ROOTS": str(service.inputs)})
    with (folder / "worker.log").open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "worker"],
            stdout=stream, stderr=stream, cwd=REPOSITORY, env={**os.environ, **service.environment, **own},
            preexec_fn=partial(die_with_parent, os.getpid()),
        )  # fmt: skip
    try:
        yield folder / "worker.log"
    finally:
        process.terminate()
        assert process.wait(HANGS_S) == 0, (folder / "worker.log").read_text()


@pytest.mark.usefixtures("one_thread")
def test_workers_that_share_a_bucket_and_no_folder_share_a_job_with_the_bits_of_one_process(
    tmp_path: Path, tiny_inputs: Path
) -> None:
    asked = recipe()
    with opened(tmp_path / "redis") as url, moto() as server:
        server.make("results")
        here = {"SHARD_SECONDS": "0.1", "REDIS_URL": url, "S3_ENDPOINT": server.url, "ARTIFACT_STORE": "s3:results/own"}
        service = make_service(tmp_path, tiny_inputs, **KEYS, **variables({**SETTINGS, **here}))
        service.start()
        try:
            with another_machine(tmp_path / "second", service) as log:
                wait_until(lambda: service.get("/readyz").json()["workers"] == WORKERS, "both workers")
                job_id = service.submit(asked)
                job = service.finished(job_id)
            assert (job["status"], job["attempt"]) == ("succeeded", 1), job["error"]
            assert [model["score_cached"] for model in job["result"]["models"]] == [False, False]
            for worker in (log, tmp_path / "serve.log"):
                assert re.search("the attempt ends: succeeded .*shard=", worker.read_text()), worker
            assert_as_alone(service, job_id, scores_of_one_process(tiny_inputs, asked, tmp_path / "alone"))
            kept = service.get("/scores", params={"limit": 100}).json()["data"]
            scored = [of for of in kept if (of["statistic"], of["examples"]) == ("mask_fisher", ROWS)]
            assert [of["source"] for of in scored] == ["local:checkpoints/b", "local:checkpoints/a"]
            prefix = "own/statistics/"
            in_bucket = [key.split("/")[-2] for key in server.keys("results") if key.startswith(prefix)]
            assert sorted(set(in_bucket)) == sorted(of["digest"] for of in kept)  # no sums of shards
            map_page = service.get(f"/dashboard/statistics/{scored[0]['digest']}")
            assert map_page.text.count("<figcaption") == 2
            content = load(service.get(scored[0]["href"]).content)
            assert {"layers.0.heads", "layers.0.heads.stderr"} <= content.keys()
        finally:
            assert service.stop() == 0


@pytest.mark.long
def test_a_job_is_cancelled_while_its_shards_run_and_the_workers_go_on(service: Service) -> None:
    job_id = service.submit(recipe())
    wait_until(lambda: is_cut(service, job_id), "shards to run", interval_s=0.02)
    assert service.post(f"/jobs/{job_id}/cancel").status_code == 202
    assert service.finished(job_id)["status"] == "cancelled"
    after = service.finished(service.submit(tiny_recipe("a", "b")))
    assert (after["status"], after["attempt"]) == ("succeeded", 1)
