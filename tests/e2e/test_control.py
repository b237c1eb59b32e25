"""Cancelling, retrying and deleting jobs of the running service."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import (
    HANGS_S,
    Service,
    assert_problem,
    keeps_within,
    make_service,
    measured_anew,
    tiny_recipe,
    wait_until,
)
from tests.tiny import tiny_checkpoint, write_rows

ROWS = 4000  # read, scored and evaluated long enough to be seen at it; such a job is never waited for
CANCEL_S = 5  # the promise for a running job
PHASES = ["scoring", *(pytest.param(phase, marks=pytest.mark.long) for phase in ("loading", "evaluating"))]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"many-{name}.jsonl", count=ROWS, labels=labels, seed=seed)
        tiny_checkpoint(tiny_inputs / "checkpoints" / f"wide-{name}", labels=labels, seed=seed, hidden=512, layers=12)
    service = make_service(tmp_path_factory.mktemp("control"), tiny_inputs)
    service.start()
    yield service
    assert service.stop() == 0


def long_recipe(**method: Any) -> dict[str, Any]:
    recipe = tiny_recipe("a", "b", **(method or {"examples": ROWS}))
    for model in recipe["models"]:
        model["dataset"]["source"] = model["evaluation"]["source"] = f"local:rows/many-{model['name']}.jsonl"
        model["evaluation"]["limit"] = ROWS
    return measured_anew(recipe)


def check_cancelled(service: Service, begin: Callable[[], str]) -> None:
    """Asked to, the job that was begun ends in time, leaves nothing, and the next one succeeds."""

    def cancelled() -> float:
        job_id = begin()
        response = service.post(f"/jobs/{job_id}/cancel")
        asked = time.monotonic()
        assert (response.status_code, response.json()["status"]) == (202, "cancelling")
        job = service.finished(job_id)
        took = time.monotonic() - asked
        assert (job["status"], job["result"], job["error"]) == ("cancelled", None, None)
        assert not list((service.data_dir / "work").glob(f"{job_id}.*"))
        assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
        return took

    keeps_within(CANCEL_S, cancelled)
    assert service.finished(service.submit(tiny_recipe("a", name="average")))["status"] == "succeeded"


@pytest.mark.parametrize("phase", PHASES)
def test_a_running_job_is_cancelled_within_5_s_in_every_phase(service: Service, phase: str) -> None:
    def begin() -> str:
        job_id = service.submit(long_recipe(**({"name": "average"} if phase == "evaluating" else {})))
        service.stand_still(job_id, phase)
        return job_id

    check_cancelled(service, begin)


@pytest.mark.long
def test_a_running_job_is_cancelled_within_5_s_while_it_merges(service: Service) -> None:
    """The phase may be over before the next look at the job, so its first file says when it has begun."""
    models = [{"name": name, "checkpoint": f"local:checkpoints/wide-{name}"} for name in ("a", "b")]
    recipe = {"method": {"name": "average"}, "models": models, "output": {"max_shard_bytes": 1_000_000}}

    def begin() -> str:
        engine = service.processes()["engine"]
        job_id = service.submit(recipe)
        folder = service.data_dir / "work" / f"{job_id}.1" / "models" / "a"
        wait_until(lambda: list(folder.glob("*.safetensors")), "the first of many shards", interval_s=0.0005)
        engine.suspend()
        wait_until(lambda: service.job(job_id)["progress"]["phase"] == "merging", "merging")
        return job_id

    check_cancelled(service, begin)


def test_a_waiting_job_is_cancelled_at_once_and_the_running_one_goes_on(service: Service) -> None:
    running, engine = service.submit_held(measured_anew(tiny_recipe()))
    waiting = service.submit(tiny_recipe())
    assert service.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
    assert service.job(running)["status"] == "running"
    engine.resume()
    assert service.finished(running)["status"] == "succeeded"
    assert service.job(waiting)["attempt"] == 0


def test_a_job_waits_for_a_worker_with_its_device_and_others_pass_it(service: Service) -> None:
    lacking = "a worker with the device cuda; none has it"
    recipe = {**tiny_recipe("a", name="average"), "device": "cuda", "priority": 10}
    assert service.post("/merge/validate", json=recipe).json()["waiting_for"] == lacking
    posted = service.post("/merge", json=recipe).json()
    assert (posted["status"], posted["waiting_for"]) == ("queued", lacking)
    path = f"/jobs/{posted['id']}"
    for kind in ("/merge", "/scores"):
        models = [{name: tiny_recipe("a")["models"][0][name] for name in ("name", "checkpoint", "dataset")}]
        body = {"models": models, "method": {"name": "mask_fisher", "examples": 4}, "device": "cpu"}
        accepted = service.post(kind, json=body).json()
        assert accepted["waiting_for"] is None
        job = service.finished(accepted["id"])
        assert (job["status"], job["result"]["device"], job["request"]["device"]) == ("succeeded", "cpu", "cpu")
    shown = service.get(path)
    assert (shown.json()["status"], shown.json()["waiting_for"]) == ("queued", lacking)
    assert service.get(path, headers={"If-None-Match": shown.headers["ETag"]}).status_code == 304
    cancelled = service.post(f"{path}/cancel", headers={"If-Match": shown.headers["ETag"]}).json()
    assert (cancelled["status"], cancelled["waiting_for"], cancelled["attempt"]) == ("cancelled", None, 0)


@pytest.mark.long
def test_a_cancelled_job_succeeds_when_it_is_retried(service: Service) -> None:
    job_id, _ = service.submit_held(measured_anew(tiny_recipe()))
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
        assert "Content-Type" not in response.headers
        assert (response.status_code, response.content) == (204, b"")
        for response in (http.delete(f"/jobs/{job_id}"), http.get(f"/jobs/{job_id}")):
            assert_problem(response, 404, "not_found")
            assert response.json()["detail"] == f"job {job_id} was deleted"
    assert not list((service.data_dir / "artifacts").glob(f"{job_id}.*"))
    assert job_id not in [job["id"] for job in service.get("/jobs").json()["data"]]


def test_what_the_state_does_not_allow_is_a_conflict(service: Service) -> None:
    running, engine = service.submit_held(measured_anew(tiny_recipe()))
    assert service.post(f"/jobs/{running}/retry").json()["code"] == "conflict"
    with service.http as http:
        assert http.delete(f"/jobs/{running}").status_code == 409
    engine.resume()
    job = service.finished(running)
    for action in ("cancel", "retry"):
        response = service.post(f"{job['links']['self']}/{action}")
        assert (response.status_code, response.json()["code"]) == (409, "conflict")
        assert "succeeded" in response.json()["detail"]


def is_empty(folder: Path, job_id: str) -> bool:
    return not list(folder.glob(f"{job_id}.*"))


TIMED_OUT_S = 8  # what a job may last beyond its deadline, on a busy machine; by design it is 4.2


@pytest.mark.long
def test_a_job_past_its_deadline_fails_whether_it_waits_or_runs_and_the_worker_lives(service: Service) -> None:
    def timed_out() -> float:
        began = time.monotonic()
        running = service.submit({**long_recipe(), "deadline_seconds": 4})
        engine = service.stand_still(running, "loading")
        waiting = service.submit({**tiny_recipe(), "deadline_seconds": 0.5})
        for job_id, attempts in ((waiting, 0), (running, 1)):
            job = service.finished(job_id)
            assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "timeout", attempts)
            assert job["error"]["retryable"]
        took = time.monotonic() - began
        engine.wait(HANGS_S)  # killed, as it would work for nobody
        for folder in ("work", "artifacts"):
            wait_until(partial(is_empty, service.data_dir / folder, running), folder)
        assert service.post(f"/jobs/{waiting}/retry").status_code == 202
        service.finished(waiting)
        return took

    keeps_within(4 + TIMED_OUT_S, timed_out)
    job = service.finished(service.submit({**tiny_recipe("a", name="average"), "deadline_seconds": 3600}))
    assert job["status"] == "succeeded"
    assert job["request"]["deadline_seconds"] == 3600


def test_an_idempotency_key_of_a_deleted_job_is_a_conflict(service: Service) -> None:
    headers = {"Idempotency-Key": "deleted"}
    recipe = tiny_recipe("a", name="average")
    job_id = service.post("/merge", json=recipe, headers=headers).json()["id"]
    service.finished(job_id)
    with service.http as http:
        http.delete(f"/jobs/{job_id}")
    response = service.post("/merge", json=recipe, headers=headers)
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
