"""Disks that fill up, memory that runs out, inputs that change: nothing is lost, and the worker takes the next job."""

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis

from tests.conftest import Service, assert_problem, make_service, measured_anew, tiny_recipe, wait_until
from tests.tiny import tiny_checkpoint, write_rows

ROWS = 3000
DISK_BYTES = 16 << 20
NEXT = tiny_recipe("a", name="average")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    root = tmp_path_factory.mktemp("resources")
    shutil.copytree(tiny_inputs, root, dirs_exist_ok=True)
    write_rows(root / "rows" / "many.jsonl", count=ROWS)
    tiny_checkpoint(root / "checkpoints" / "wide", hidden=64, seed=5)
    return root


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def service(redis_url: str, disk: Path, inputs: Path) -> Iterator[Service]:
    """A service whose artifacts lie on the small disk, and whose Redis does not."""
    with Redis.from_url(redis_url) as client:
        client.flushall()
    service = make_service(disk, inputs, MASKMERGE_REDIS_URL=redis_url, MASKMERGE_MIN_FREE_BYTES="0")
    service.start()
    yield service
    assert service.stop() == 0


def fill(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave))
    return filler


def long_recipe(*names: str) -> dict[str, Any]:
    recipe = tiny_recipe(*names, examples=ROWS)
    for model in recipe["models"]:
        model["dataset"]["source"] = model["evaluation"]["source"] = "local:rows/many.jsonl"
    return measured_anew(recipe)


def scoring(service: Service, recipe: dict[str, Any]) -> tuple[str, psutil.Process]:
    """A job and the engine that scores for it, which is suspended."""
    job_id = service.submit(recipe)
    return job_id, service.stand_still(job_id, "scoring")


def assert_nothing_is_left(service: Service, job_id: str) -> None:
    assert not list((service.data_dir / "work").glob(f"{job_id}*"))
    assert not list((service.data_dir / "artifacts").glob(f"{job_id}*"))


def limit(service: Service, further_bytes: int) -> None:
    """Set how many bytes more the engine process of this moment may take; its successor is free again."""
    engine = service.processes()["engine"]
    soft = engine.memory_info().vms + further_bytes
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))


def wait_until_idle(service: Service) -> None:
    """Until the engine process has imported its libraries: some wait for ever for memory that is not there."""

    def rests() -> bool:
        engine = service.processes().get("engine")
        before = engine.cpu_times() if engine else None
        time.sleep(0.5)
        return engine is not None and before == engine.cpu_times()

    wait_until(rests, "the engine to rest")


def test_a_job_does_not_begin_without_the_memory_it_needs_and_fails_alone_when_it_runs_out(service: Service) -> None:
    """The first test, each time with a new engine: one that has worked holds memory that no limit takes from it."""
    plan = service.post("/merge/validate", json=tiny_recipe()).json()
    assert plan["peak_memory_bytes"] > 650_000_000
    wait_until_idle(service)
    limit(service, 50_000_000)
    too_large = service.finished(service.submit(tiny_recipe()))
    assert (too_large["status"], too_large["error"]["code"]) == ("failed", "out_of_memory")
    assert "the job needs about" in too_large["error"]["message"]
    assert too_large["error"]["detail"]["needed_bytes"] > too_large["error"]["detail"]["available_bytes"]
    assert_nothing_is_left(service, too_large["id"])

    wait_until_idle(service)
    job_id, engine = scoring(service, long_recipe("wide"))
    engine.resume()
    limit(service, 0)
    job = service.finished(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "out_of_memory"), job["error"]
    assert_nothing_is_left(service, job_id)

    assert service.finished(service.submit(NEXT))["status"] == "succeeded"
    assert service.post(f"/jobs/{too_large['id']}/retry").status_code == 202
    assert service.finished(too_large["id"])["status"] == "succeeded"


def test_a_full_disk_refuses_at_the_door_fails_what_waits_and_what_writes_and_all_can_be_tried_again(
    service: Service, disk: Path
) -> None:
    running, engine = scoring(service, long_recipe("a", "c"))
    waiting = service.submit(tiny_recipe("a", "c"))
    filler = fill(disk, leave=20_000)
    assert_problem(service.post("/merge", json=tiny_recipe()), 507, "no_space")
    engine.resume()
    for job_id, words in ((running, "no space left"), (waiting, "the artifact needs")):
        job = service.finished(job_id)
        assert (job["status"], job["error"]["code"], job["error"]["retryable"]) == ("failed", "disk_full", True)
        assert words in job["error"]["message"]
        assert_nothing_is_left(service, job_id)
    filler.unlink()
    for job_id in (running, waiting):
        assert service.post(f"/jobs/{job_id}/retry").status_code == 202
        assert service.finished(job_id)["status"] == "succeeded"


@pytest.mark.long
def test_a_checkpoint_that_is_changed_while_the_job_waits_or_runs_fails_it_by_name(
    service: Service, inputs: Path
) -> None:
    folder = inputs / "checkpoints" / "moving"
    recipe = long_recipe("a", "moving")
    tiny_checkpoint(folder, seed=6)
    running, engine = scoring(service, recipe)
    waiting = service.submit(recipe)
    with (folder / "model.safetensors").open("r+b") as stream:  # the same file, not another in its place
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\1")
    engine.resume()
    for job_id, words in ((running, "while the job ran"), (waiting, "after the job was accepted")):
        job = service.finished(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_checkpoint"), job["error"]
        assert "local:checkpoints/moving" in job["error"]["message"]
        assert words in job["error"]["message"]
        assert_nothing_is_left(service, job_id)
    assert service.finished(service.submit(recipe))["status"] == "succeeded"


@pytest.mark.long
def test_files_that_are_put_in_the_place_of_a_checkpoints_change_nothing_for_a_job_that_runs(
    service: Service, inputs: Path
) -> None:
    folder = inputs / "checkpoints" / "replaced"
    tiny_checkpoint(folder, seed=8)
    before = service.finished(service.submit(long_recipe("a", "replaced")))["result"]
    running, engine = scoring(service, long_recipe("a", "replaced"))
    for file in list(folder.iterdir()):
        file.unlink()
        file.symlink_to("/etc/passwd")
    engine.resume()
    job = service.finished(running)
    assert job["status"] == "succeeded", job["error"]
    assert [model["digest"] for model in job["result"]["models"]] == [model["digest"] for model in before["models"]]
