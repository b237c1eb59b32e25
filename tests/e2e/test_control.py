"""Cancelling, retrying and deleting jobs of the running service."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, make_service, measured_anew, tiny_recipe, wait_until
from tests.tiny import tiny_checkpoint, write_rows

ROWS = 3000
CANCEL_S = 5  # the promise for a running job
PHASES = ["loading", "scoring", "evaluating"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"many-{name}.jsonl", count=ROWS, labels=labels, seed=seed)
        tiny_checkpoint(tiny_inputs / "checkpoints" / f"wide-{name}", labels=labels, seed=seed, hidden=512)
    service = make_service(tmp_path_factory.mktemp("control"), tiny_inputs)
    service.start()
    yield service
    assert service.stop() == 0


def long_recipe() -> dict[str, Any]:
    recipe = tiny_recipe("a", "b", examples=ROWS)
    for model in recipe["models"]:
        model["dataset"]["source"] = model["evaluation"]["source"] = f"local:rows/many-{model['name']}.jsonl"
        model["evaluation"]["limit"] = ROWS
    return measured_anew(recipe)


def start(service: Service, phase: str) -> str:
    job_id = service.submit(long_recipe())
    wait_until(lambda: service.job(job_id)["progress"]["phase"] == phase, phase, interval_s=0.01)
    return job_id


@pytest.mark.parametrize("phase", PHASES)
def test_a_running_job_is_cancelled_within_5_s_in_every_phase(service: Service, phase: str) -> None:
    check_cancelled(service, start(service, phase))


def check_cancelled(service: Service, job_id: str) -> None:
    """Asked to, the job ends in time, leaves nothing, and the next one succeeds."""
    response = service.post(f"/jobs/{job_id}/cancel")
    asked = time.monotonic()
    assert (response.status_code, response.json()["status"]) == (202, "cancelling")
    job = service.finished(job_id)
    assert time.monotonic() - asked < CANCEL_S
    assert (job["status"], job["result"], job["error"]) == ("cancelled", None, None)
    assert not list((service.data_dir / "work").glob(f"{job_id}.*"))
    assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
    assert service.finished(service.submit(tiny_recipe("a", name="average")))["status"] == "succeeded"


def test_a_running_job_is_cancelled_within_5_s_while_it_merges(service: Service) -> None:
    """The phase is over in a moment with models this small, so the engine is made to stand still in its middle."""
    recipe = tiny_recipe("a", "b", name="average")
    for model in recipe["models"]:
        model["checkpoint"] = f"local:checkpoints/wide-{model['name']}"
    recipe["output"] = {"max_shard_bytes": 1_000_000}
    engine = service.processes()["engine"]
    job_id = service.submit(recipe)
    folder = service.data_dir / "work" / f"{job_id}.1" / "models" / "a"
    wait_until(lambda: list(folder.glob("*.safetensors")), "the first of several shards", interval_s=0.0005)
    engine.suspend()
    wait_until(lambda: service.job(job_id)["progress"]["phase"] == "merging", "merging")
    check_cancelled(service, job_id)


def test_a_waiting_job_is_cancelled_at_once_and_the_running_one_goes_on(service: Service) -> None:
    running = start(service, "scoring")
    waiting = service.submit(tiny_recipe())
    assert service.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
    assert service.job(running)["status"] == "running"
    assert service.finished(running)["status"] == "succeeded"
    assert service.job(waiting)["attempt"] == 0


def test_a_cancelled_job_succeeds_when_it_is_retried(service: Service) -> None:
    job_id = start(service, "scoring")
    service.post(f"/jobs/{job_id}/cancel")
    assert service.finished(job_id)["status"] == "cancelled"
    response = service.post(f"/jobs/{job_id}/retry")
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    job = service.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)


def test_a_deleted_job_is_gone_with_its_artifact(service: Service) -> None:
    job_id = service.submit(tiny_recipe("a", name="average"))
    service.finished(job_id)
    assert list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
    with service.http as http:
        response = http.delete(f"/jobs/{job_id}")
        assert (response.status_code, response.content) == (204, b"")
        assert http.delete(f"/jobs/{job_id}").status_code == 404
    assert service.get(f"/jobs/{job_id}").status_code == 404
    assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
    assert job_id not in [job["id"] for job in service.get("/jobs").json()["data"]]


def test_what_the_state_does_not_allow_is_a_conflict(service: Service) -> None:
    running = start(service, "scoring")
    assert service.post(f"/jobs/{running}/retry").json()["code"] == "conflict"
    with service.http as http:
        assert http.delete(f"/jobs/{running}").status_code == 409
    job = service.finished(running)
    for action in ("cancel", "retry"):
        response = service.post(f"{job['links']['self']}/{action}")
        assert (response.status_code, response.json()["code"]) == (409, "conflict")
        assert "succeeded" in response.json()["detail"]


def test_an_idempotency_key_of_a_deleted_job_is_a_conflict(service: Service) -> None:
    headers = {"Idempotency-Key": "deleted"}
    recipe = tiny_recipe("a", name="average")
    job_id = service.post("/merge", json=recipe, headers=headers).json()["id"]
    service.finished(job_id)
    with service.http as http:
        http.delete(f"/jobs/{job_id}")
    response = service.post("/merge", json=recipe, headers=headers)
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
