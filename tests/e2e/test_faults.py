"""Processes really killed, in the middle of the work: one finished job, later, and no second result."""

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.client import Client
from tests.conftest import (
    HANGS_S,
    REPOSITORY,
    Service,
    keeps_within,
    make_service,
    measured_anew,
    running,
    tiny_recipe,
    wait_until,
)
from tests.tiny import tiny_checkpoint, write_rows
from worker.engine.checkpoints.reader import digest_file

ROWS = 3000  # scored in more than a second, so that the phase is seen
NewService = Callable[..., Service]
BACK_IN_QUEUE_S = 15  # the promise: a lost attempt is queued again within this


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"many-{name}.jsonl", count=ROWS, labels=labels, seed=seed)
    return tiny_inputs


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator[Service]:
    """What is killed again and again, and is whole again each time."""
    service = make_service(tmp_path_factory.mktemp("faults"), inputs, MASKMERGE_MAX_LOSSES="100")
    service.start()
    yield service
    before = service.processes()
    assert service.stop() == 0
    assert not [p for p in before.values() if p.is_running()], "a process was left behind"


@pytest.fixture
def service(survivor: Service) -> Service:
    """The survivor, at work also where another test failed before it had started it again."""
    assert survivor.process is not None
    if survivor.process.poll() is not None:
        survivor.start()
    survivor.wait_ready()
    return survivor


def long_recipe() -> dict[str, Any]:
    recipe = tiny_recipe("a", "b", examples=ROWS)
    for model in recipe["models"]:
        model["dataset"]["source"] = f"local:rows/many-{model['name']}.jsonl"
    return measured_anew(recipe)


def scoring(service: Service, job_id: str) -> bool:
    progress = service.job(job_id)["progress"]
    return bool(progress["phase"] == "scoring" and progress["done"] > 0)


def start_scoring(service: Service) -> tuple[str, psutil.Process]:
    """A job and the engine that scores for it, which is suspended."""
    job_id = service.submit(long_recipe())
    return job_id, service.stand_still(job_id, "scoring")


def check_one_result(service: Service, job_id: str) -> None:
    """The job succeeded once: one artifact, whole, and nothing left of the attempts that were killed."""
    job = service.finished(job_id)
    assert job["status"] == "succeeded", job["error"]
    assert job["attempt"] >= 2
    assert [entry["id"] for entry in service.get("/jobs").json()["data"]].count(job_id) == 1
    assert service.get(f"/jobs/{job_id}/archive").status_code == 200
    artifacts = [folder.name for folder in (service.data_dir / "artifacts").glob(f"{job_id}.*")]
    assert artifacts == [f"{job_id}.{job['attempt']}"]
    wait_until(lambda: not list((service.data_dir / "work").iterdir()), "the work folder to be empty")


def wait_gone(*processes: psutil.Process) -> None:
    psutil.wait_procs(processes, timeout=HANGS_S)
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]


def is_queued_again(service: Service, job_id: str) -> bool:
    job = service.job(job_id)
    return bool(job["status"] == "queued" or job["attempt"] > 1)


def is_at(service: Service, job_id: str, attempt: int) -> bool:
    return bool(service.job(job_id)["attempt"] == attempt)


def test_a_killed_engine_costs_an_attempt_and_no_job(service: Service) -> None:
    job_id, engine = start_scoring(service)
    engine.kill()
    check_one_result(service, job_id)


@pytest.mark.long
def test_a_killed_worker_costs_an_attempt_and_no_job(service: Service) -> None:
    def queued_again() -> float:
        job_id, engine = start_scoring(service)
        service.processes()["worker"].kill()
        killed = time.monotonic()
        wait_gone(engine)  # it must not go on without its worker
        wait_until(lambda: is_queued_again(service, job_id), "the job to be queued again")
        took = time.monotonic() - killed
        check_one_result(service, job_id)
        return took

    keeps_within(BACK_IN_QUEUE_S, queued_again)


@pytest.mark.long
def test_a_killed_worker_loses_no_job_whatever_its_priority_and_the_highest_goes_first(service: Service) -> None:
    low, engine = start_scoring(service)
    later = {
        priority: service.submit({**tiny_recipe("a", name="average"), "priority": priority})
        for priority in (-10, 9, 10)
    }
    worker = service.processes()["worker"]
    worker.kill()
    wait_gone(engine, worker)
    check_one_result(service, low)
    assert {service.finished(job_id)["status"] for job_id in later.values()} == {"succeeded"}
    in_order = [later[10], later[9], low, later[-10]]
    started = [service.job(job_id)["started_at"] for job_id in in_order]
    assert started[:2] == sorted(started)[:2], "the highest first, before the one that was lost"
    assert [service.job(job_id)["attempt"] for job_id in in_order] == [1, 1, 2, 1]


@pytest.mark.parametrize("role", ["redis", pytest.param("api", marks=pytest.mark.long)])
def test_a_killed_redis_or_api_costs_nothing(service: Service, role: str) -> None:
    job_id, engine = start_scoring(service)
    service.processes()[role].kill()
    engine.resume()
    job = service.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)


@pytest.mark.parametrize(
    "all_at_once", [True, pytest.param(False, marks=pytest.mark.long)], ids=["everything", "the supervisor"]
)
def test_after_sigkill_a_restart_goes_on(service: Service, all_at_once: bool) -> None:
    job_id, _ = start_scoring(service)
    waiting = service.submit(tiny_recipe("a", name="average"))
    victims = service.processes()
    assert set(victims) == {"supervisor", "redis", "api", "inspector", "worker", "engine"}
    for role, process in victims.items():
        if all_at_once or role == "supervisor":
            process.kill()
    wait_gone(*victims.values())
    assert service.process is not None
    service.process.wait()
    service.start()
    assert service.finished(waiting)["status"] == "succeeded"
    job = service.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert not [folder.name for folder in (service.data_dir / "artifacts").iterdir() if folder.name == f"{job_id}.1"]


def test_an_orderly_stop_hands_the_job_back_and_a_restart_goes_on(service: Service) -> None:
    before = len(service.log)
    job_id, _ = start_scoring(service)
    processes = service.processes()
    assert service.stop() == 0
    wait_gone(*processes.values())
    service.start()
    check_one_result(service, job_id)
    assert "lost its worker" not in service.log[before:]


@pytest.mark.long
def test_a_stopped_service_refuses_nobody_a_second_data_folder_is_free(service: Service) -> None:
    command = [sys.executable, "-m", "app.cli", "serve", "--data-dir", str(service.data_dir), "--port", "1"]
    second = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPOSITORY, env={**os.environ})
    _, errors = second.communicate(timeout=HANGS_S)
    assert second.returncode == 1
    assert b"is in use by another maskmerge" in errors


def test_a_byte_that_changes_between_writing_and_publishing_fails_the_job_and_nothing_is_published(
    service: Service,
) -> None:
    recipe = tiny_recipe("a", "b", name="linear")
    for model in recipe["models"]:
        model["evaluation"] = {**model["dataset"], "source": f"local:rows/many-{model['name']}.jsonl"}
    job_id = service.submit(recipe)
    engine = service.stand_still(job_id, "evaluating")
    [file] = (service.data_dir / "work").glob(f"{job_id}.*/models/a/model-00001-of-*.safetensors")
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        [last] = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    engine.resume()
    job = service.finished(job_id)
    assert (job["status"], job["error"]["code"], job["error"]["retryable"]) == ("failed", "storage_error", True)
    name = f"models/a/{file.name}"
    assert job["error"]["message"].startswith(f"{name} is not what was merged: the file has other values of tensor ")
    assert job["error"]["detail"]["file"] == name
    assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
    assert not list((service.data_dir / "work").glob(f"{job_id}.*"))
    assert service.post(f"/jobs/{job_id}/retry").status_code == 202
    assert service.finished(job_id)["status"] == "succeeded"


def test_a_job_whose_engine_dies_every_time_fails_and_the_worker_lives(new_service: NewService, inputs: Path) -> None:
    service = new_service(MASKMERGE_MAX_LOSSES="2")
    service.start()
    job_id = service.submit(long_recipe())
    for attempt in (1, 2):

        def is_scoring(number: int = attempt) -> bool:
            return service.job(job_id)["attempt"] == number and scoring(service, job_id)

        wait_until(is_scoring, f"attempt {attempt}", interval_s=0.02)
        service.processes()["engine"].kill()
    job = service.finished(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_lost")
    assert job["error"]["retryable"]
    assert service.finished(service.submit(tiny_recipe("a", name="average")))["status"] == "succeeded"
    assert service.stop() == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Iterator[Service]:
    """Two workers."""
    variables = {"MASKMERGE_MAX_LOSSES": "100", "MASKMERGE_LEASE_SECONDS": "3", "MASKMERGE_HEARTBEAT_SECONDS": "3"}
    service = make_service(tmp_path_factory.mktemp("pair"), inputs, **variables)
    service.start(workers=2)
    yield service
    assert service.stop() == 0


@pytest.mark.long
def test_two_workers_share_the_queue_and_survive_the_loss_of_one(pair: Service) -> None:
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers")
    jobs = [pair.submit(long_recipe()) for _ in range(2)]
    wait_until(lambda: all(scoring(pair, job_id) for job_id in jobs), "both at once", interval_s=0.02)
    pair.processes()["worker"].kill()
    for job_id in jobs:
        assert pair.finished(job_id)["status"] == "succeeded"
    assert sorted(pair.job(job_id)["attempt"] for job_id in jobs) == [1, 2]
    assert len(list((pair.data_dir / "artifacts").iterdir())) == 2


def all_of(service: Service, word: str) -> list[psutil.Process]:
    """Processes of the service that have the word in their command."""
    assert service.process is not None
    supervisor = psutil.Process(service.process.pid)
    return [process for process, words in running(supervisor) if process != supervisor and word in words]


@pytest.mark.long
def test_engines_that_stand_still_are_noticed_idle_or_at_work_and_replaced(pair: Service) -> None:
    """Readiness does not count them, and their jobs are done by others."""
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers")
    # A worker that was killed a moment ago may still be counted.
    wait_until(lambda: len(all_of(pair, "worker.engine_process")) == 2, "both engines")
    stopped = all_of(pair, "worker.engine_process")
    job_id = pair.submit(long_recipe())
    wait_until(lambda: scoring(pair, job_id), "one at work, and one idle", interval_s=0.02)
    for engine in stopped:
        engine.suspend()
    psutil.wait_procs(stopped, timeout=HANGS_S)
    assert not [engine for engine in stopped if engine.is_running()]
    job = pair.finished(job_id)
    assert job["status"] == "succeeded"
    assert job["attempt"] >= 2  # more where a busy machine holds up an engine for as long as these were
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers again")


def worker_of(service: Service, job_id: str) -> psutil.Process:
    """The worker that has the job in hand; its name, in the job's log, holds its process id."""
    with Client(service.url, timeout_s=HANGS_S) as client:
        for entry in client.log(job_id):
            if entry.code == "attempt_started":
                return psutil.Process(int(entry.message.rsplit("-", 2)[1]))
    pytest.fail("nobody has it")


@pytest.mark.long
def test_a_worker_that_stands_still_loses_its_job_to_another_and_does_no_harm_when_it_goes_on(pair: Service) -> None:
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers")
    job_id = pair.submit(long_recipe())
    wait_until(lambda: scoring(pair, job_id), "one at work", interval_s=0.02)
    worker = worker_of(pair, job_id)
    worker.suspend()
    job = pair.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 1, "the worker that stands still not to count")
    worker.resume()
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "the other worker again")
    wait_until(lambda: not list((pair.data_dir / "work").iterdir()), "the work folder to be empty")
    assert pair.job(job_id) == job
    assert [folder.name for folder in (pair.data_dir / "artifacts").glob(f"{job_id}.*")] == [f"{job_id}.2"]


@pytest.mark.long
def test_a_redis_that_stands_still_for_longer_than_a_lease_costs_no_attempt(pair: Service) -> None:
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers")
    workers = {worker.pid for worker in all_of(pair, "worker")}
    job_id = pair.submit(long_recipe())
    wait_until(lambda: scoring(pair, job_id), "work", interval_s=0.02)
    redis = pair.processes()["redis"]
    redis.suspend()
    time.sleep(8)  # a lease is 3 s
    assert pair.get("/readyz").status_code == 503
    redis.resume()
    job = pair.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    wait_until(lambda: pair.get("/readyz").json().get("workers") == 2, "both workers again")
    assert {worker.pid for worker in all_of(pair, "worker")} == workers


@pytest.mark.long
def test_many_jobs_survive_many_kills_at_random_times(pair: Service) -> None:
    """Whatever is killed, and whenever: every job ends once, and nothing is left of the attempts that did not."""
    jobs = [pair.submit(tiny_recipe("a", "b", "c", examples=200)) for _ in range(6)]
    rng = random.Random(7)
    for role in rng.sample(["engine", "worker", "api", "redis"] * 2, 8):
        time.sleep(rng.uniform(0.2, 2.5))  # the time of the kill is what is tried here
        victim = pair.processes().get(role)
        if victim is not None:
            victim.kill()
    for job_id in jobs:
        job = pair.finished(job_id)
        assert job["status"] == "succeeded", job["error"]
        artifacts = [folder.name for folder in (pair.data_dir / "artifacts").glob(f"{job_id}.*")]
        assert artifacts == [f"{job_id}.{job['attempt']}"]
    assert not list((pair.data_dir / "work").iterdir())


@pytest.fixture(scope="module")
def large(inputs: Path) -> dict[str, Any]:
    """A merge whose backbone of 100 MB is written in so long a time that there is a middle to kill in."""
    for seed in range(2):
        tiny_checkpoint(inputs / "checkpoints" / f"large{seed}", seed=seed, hidden=1024, layers=6)
    models = [{"name": f"m{seed}", "checkpoint": f"local:checkpoints/large{seed}"} for seed in range(2)]
    return {"method": {"name": "average"}, "models": models}


def written(service: Service, job_id: str, attempt: int) -> float:
    """The share of its first shard that an attempt has written; 0 while there is none, 1 once it is published."""
    name = "models/m0/model-00001-of-00002.safetensors"
    if (service.data_dir / "artifacts" / f"{job_id}.{attempt}").exists():
        return 1.0
    try:
        stat = (service.data_dir / "work" / f"{job_id}.{attempt}" / name).stat()
    except FileNotFoundError:
        return 0.0
    return stat.st_blocks * 512 / max(1, stat.st_size)  # the moment it is made, it has no size yet


def wait_written(service: Service, job_id: str, attempt: int, share: float) -> None:
    what = f"attempt {attempt} to write {share} of its shard"
    wait_until(lambda: written(service, job_id, attempt) >= share, what, interval_s=0.0005)


@pytest.mark.long
def test_killed_at_any_byte_of_the_write_nothing_is_published_and_the_job_is_done_again(
    service: Service, large: dict[str, Any]
) -> None:
    job_id = service.submit(large)
    # Not nearer to the end: on a busy machine it may come between what is seen and the kill.
    kills = (("engine", 0.001), ("worker", 0.2), ("engine", 0.35), ("everything", 0.5))
    for attempt, (role, share) in enumerate(kills, start=1):
        wait_until(partial(is_at, service, job_id, attempt), f"attempt {attempt}", interval_s=0.01)
        victims = service.processes()
        wait_written(service, job_id, attempt, share)
        for victim in victims.values() if role == "everything" else [victims[role]]:
            victim.kill()
        wait_gone(*(victims.values() if role == "everything" else [victims["engine"]]))
        assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*")), f"attempt {attempt} came to its end"
        if role == "everything":
            assert service.process is not None
            service.process.wait()
            service.start()
        assert service.get(f"/jobs/{job_id}/artifacts").status_code == 409
    check_one_result(service, job_id)
    files = service.get(f"/jobs/{job_id}/artifacts").json()["files"]
    folder = service.data_dir / "artifacts" / f"{job_id}.{service.job(job_id)['attempt']}"
    assert {file["name"]: file["sha256"] for file in files if file["name"].startswith("models/")} == {
        path.relative_to(folder).as_posix(): digest_file(path) for path in folder.glob("models/*/*")
    }


def test_a_limit_on_files_fails_the_job_by_its_name_and_leaves_nothing(service: Service) -> None:
    recipe = tiny_recipe("a", "c", name="average")
    engine = service.processes()["engine"]
    before = resource.prlimit(engine.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, (10_000, before[1]))
    job = service.finished(service.submit(recipe))
    assert (job["status"], job["error"]["code"], job["error"]["retryable"]) == ("failed", "disk_full", True)
    assert "ulimit -f" in job["error"]["message"]
    for folder in ("work", "artifacts"):
        assert not list((service.data_dir / folder).glob(f"{job['id']}.*"))
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, before)
    assert service.post(f"/jobs/{job['id']}/retry").status_code == 202
    assert service.finished(job["id"])["status"] == "succeeded"
