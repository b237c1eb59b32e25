"""Merges of merges: a model of an earlier job's artifact as checkpoint or base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Service, assert_problem, tiny_recipe
from tests.tiny import read_model

UNKNOWN = "0" * 28


@pytest.fixture(scope="module")
def first(service: Service) -> dict[str, Any]:
    """A merge of `a` and `b`."""
    job = service.finished(service.submit(averages("local:checkpoints/a", "local:checkpoints/b")))
    assert job["status"] == "succeeded", job["error"]
    return job


def averages(*checkpoints: str, **changes: Any) -> dict[str, Any]:
    models = [{"name": name, "checkpoint": source} for name, source in zip("abc", checkpoints, strict=False)]
    return {"method": {"name": "average"}, "models": models, **changes}


def artifact(service: Service, job: dict[str, Any]) -> Path:
    return next((service.data_dir / "artifacts").glob(f"{job['id']}.*"))


def test_a_merge_takes_models_of_an_earlier_one(service: Service, first: dict[str, Any]) -> None:
    reference = f"job:{first['id']}/a"
    response = service.post("/merge", json=averages(reference, "local:checkpoints/c"))
    assert response.status_code == 202, response.text
    assert response.json()["request"]["models"][0]["checkpoint"] == reference
    job = service.finished(response.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["models"][0]["checkpoint"] == reference
    inputs = [read_model(service.inputs / "checkpoints" / name) for name in "abc"]
    found = read_model(artifact(service, job) / "models" / "a")
    for name, tensor in found.items():
        if not name.startswith("classifier"):
            a, b, c = (tensors[name].double() for tensors in inputs)
            torch.testing.assert_close(tensor.double(), ((a + b) / 2 + c) / 2, rtol=0, atol=1e-6)
    assert torch.equal(found["classifier.weight"], inputs[0]["classifier.weight"])
    manifest = json.loads((artifact(service, job) / "manifest.json").read_text())
    assert manifest["inputs"]["a"]["checkpoint"] == reference
    assert manifest["inputs"]["a"]["digest"].startswith("sha256:")


def test_a_base_may_be_of_an_earlier_merge_and_its_models_are_measured(service: Service, first: dict[str, Any]) -> None:
    recipe = {**tiny_recipe("a", "b", examples=32, scale=1.1), "base": f"job:{first['id']}/b"}
    recipe["models"][0]["checkpoint"] = f"job:{first['id']}/a"
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["models"][0]["examples"] == 32
    again = service.finished(service.submit(job["request"]))
    assert again["result"]["models"][0]["digest"] == job["result"]["models"][0]["digest"]


def test_bytes_that_changed_since_they_were_written_are_not_used(service: Service) -> None:
    """On a disk that lost some, or by hand: a file has its length, and another content than its job wrote."""
    job = service.finished(service.submit(averages("local:checkpoints/a", "local:checkpoints/b")))
    *_, weights = sorted(
        (artifact(service, job) / "models" / "a").glob("*.safetensors")
    )  # the head's, which is its own
    with weights.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    failed = service.finished(service.submit(averages(f"job:{job['id']}/a", "local:checkpoints/c")))
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_checkpoint")
    assert f"job:{job['id']}/a: {weights.name} is damaged" in failed["error"]["message"]
    other = service.finished(service.submit(averages(f"job:{job['id']}/b", "local:checkpoints/c")))
    assert other["status"] == "succeeded", other["error"]


def test_what_no_job_has_made_is_refused_at_the_door(service: Service, first: dict[str, Any]) -> None:
    refused = {
        f"job:{UNKNOWN}/a": f"there is no job {UNKNOWN}",
        f"job:{first['id']}/z": f"job {first['id']} has no model z; there are a, b",
        f"job:{first['id']}/..": "write job:ID/MODEL",
        f"job:{first['id']}/a/../b": "write job:ID/MODEL",
        "job:1/a": "write job:ID/MODEL",
    }
    for reference, says in refused.items():
        for recipe in (averages(reference), averages("local:checkpoints/a", base=reference)):
            response = service.post("/merge", json=recipe)
            assert_problem(response, 422, "invalid_request")
            assert says in response.json()["detail"]


def test_a_job_that_did_not_succeed_has_no_models_and_its_status_is_named(service: Service) -> None:
    recipe = averages("local:checkpoints/a")
    service.submit(tiny_recipe("a", "b", "c", examples=200))  # so that what follows waits
    job_id = service.submit(recipe)
    service.post(f"/jobs/{job_id}/cancel")
    status = service.finished(job_id)["status"]
    assert status == "cancelled"
    response = service.post("/merge", json=averages(f"job:{job_id}/a"))
    assert_problem(response, 422, "invalid_request")
    assert f"job {job_id} is cancelled" in response.json()["detail"]


def test_scores_make_no_models_but_are_taken_of_them(service: Service, first: dict[str, Any]) -> None:
    recipe = tiny_recipe("a", examples=16)
    del recipe["models"][0]["evaluation"]
    recipe["models"][0]["checkpoint"] = f"job:{first['id']}/a"
    response = service.post("/scores", json=recipe)
    assert response.status_code == 202, response.text
    job = service.finished(response.json()["id"])
    assert job["status"] == "succeeded", job["error"]
    refused = service.post("/merge", json=averages(f"job:{job['id']}/a"))
    assert_problem(refused, 422, "invalid_request")
    assert "has no model a; it made none" in refused.json()["detail"]


def test_a_job_has_no_rows(service: Service, first: dict[str, Any]) -> None:
    recipe = tiny_recipe("a")
    recipe["models"][0]["dataset"]["source"] = f"job:{first['id']}/a"
    response = service.post("/merge", json=recipe)
    assert_problem(response, 422, "invalid_request")
    assert "models.0.dataset.source" in response.text
    assert "has no rows" in response.text


def test_a_job_that_is_deleted_while_another_waits_for_its_model_fails_that(service: Service) -> None:
    earlier = service.finished(service.submit(averages("local:checkpoints/a")))
    blocker = service.submit(tiny_recipe("a", "b", "c", examples=200))
    job_id = service.submit(averages(f"job:{earlier['id']}/a"))
    with service.http as http:
        assert http.delete(f"/jobs/{earlier['id']}").status_code == 204
    job = service.finished(job_id)
    assert service.finished(blocker)["status"] == "succeeded"
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_checkpoint")
    assert f"job {earlier['id']} was deleted after this one was accepted" in job["error"]["message"]
    refused = service.post("/merge", json=averages(f"job:{earlier['id']}/a"))
    assert f"job {earlier['id']} was deleted" in refused.json()["detail"]


def test_the_single_model_of_an_artifact_is_called_model(service: Service) -> None:
    earlier = service.finished(service.submit(averages("local:checkpoints/a")))
    folder = artifact(service, earlier)
    (folder / "models" / "a").rename(folder / "model")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"models/a/', '"model/'))
    job = service.finished(service.submit(averages(f"job:{earlier['id']}/model")))
    assert job["status"] == "succeeded", job["error"]
