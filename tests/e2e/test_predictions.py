"""A merge is tried on the running service: its answers, and what happens to workers, queue and jobs meanwhile."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.client import Client, Refused
from tests.conftest import HANGS_S, Service, assert_problem, measured_anew, tiny_recipe, wait_until
from tests.tiny import edit_json, tiny_texts

TEXTS = tiny_texts(3, 8, longest=10)
SECRET = "xylophones"
MOMENT_S = 0.5


@pytest.fixture(scope="module")
def job(service: Service, tiny_inputs: Path) -> dict[str, Any]:
    """A merge of checkpoints that no other test has."""
    for name in ("a", "b"):
        shutil.copytree(tiny_inputs / "checkpoints" / name, tiny_inputs / "checkpoints" / f"tried-{name}")
    recipe = tiny_recipe("a", "b", name="average")
    for model in recipe["models"]:
        model["checkpoint"] = f"local:checkpoints/tried-{model['name']}"
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    return job


def predict(service: Service, job: dict[str, Any], *rows: Any, model: str = "a") -> httpx.Response:
    return service.post(f"/jobs/{job['id']}/predict", json={"model": model, "rows": rows or [SECRET]})


def meanwhile(service: Service, job: dict[str, Any], act: Callable[[], object]) -> httpx.Response:
    """The answer to a request that waits for a worker while something happens."""
    with ThreadPoolExecutor(1) as pool:
        answer: Future[httpx.Response] = pool.submit(predict, service, job)
        time.sleep(MOMENT_S)
        assert not answer.done()
        act()
        return answer.result(HANGS_S)


def test_answers_are_those_of_the_models_that_were_downloaded_and_nothing_else_changes(
    service: Service, job: dict[str, Any], tmp_path: Path
) -> None:
    jobs = service.get("/jobs?limit=100").json()["data"]
    with Client(service.url, timeout_s=HANGS_S) as client:
        answers = client.predict(job["id"], "b", TEXTS)
        client.download(job["id"], tmp_path)
        with pytest.raises(Refused, match="did you mean 'b'") as refused:
            client.predict(job["id"], "B", TEXTS)
        assert (refused.value.code, refused.value.errors[0].field) == ("invalid_request", "model")
    assert answers.task == "classification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "b")
    folders = {"expert": service.inputs / "checkpoints" / "tried-b", "merged": tmp_path / "models" / "b"}
    for version, folder in folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for text, row in zip(TEXTS, answers.rows, strict=True):
            with torch.no_grad():
                wanted = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0).tolist()
            found = getattr(row, version).model_dump()
            named = {model.config.id2label[index]: value for index, value in enumerate(wanted)}
            assert found["probabilities"] == pytest.approx(named, abs=1e-5)
            assert found["label"] == max(named, key=named.__getitem__)
    assert service.job(job["id"]) == job
    assert service.get("/jobs?limit=100").json()["data"] == jobs


def test_rows_that_do_not_fit_are_refused_by_their_place_and_stay_out_of_the_log(
    service: Service, job: dict[str, Any]
) -> None:
    refused: list[tuple[list[Any], str, str]] = [
        ([TEXTS[0], f"{SECRET} " * 60], "invalid_dataset", "rows.1"),
        ([{"text": SECRET, SECRET[::-1]: 1}], "invalid_dataset", "rows.0"),
        ([TEXTS[0], 7], "invalid_request", "rows.1"),
        ([SECRET * 2000], "invalid_request", "rows.0"),
        ([SECRET] * 17, "invalid_request", "rows"),
        ([], "invalid_request", "rows"),
    ]
    for rows, code, field in refused:
        answer = service.post(f"/jobs/{job['id']}/predict", json={"model": "a", "rows": rows})
        assert_problem(answer, 422, code)
        assert [error["field"] for error in answer.json()["errors"]] == [field], answer.text
        assert SECRET not in answer.text
    assert predict(service, job, SECRET).status_code == 200
    assert SECRET not in service.log
    assert SECRET[::-1] not in service.log


def test_it_waits_for_the_task_in_hand_and_goes_before_the_next_one(service: Service, job: dict[str, Any]) -> None:
    tried_before = service.log.count("to try")
    first, engine = service.submit_held(measured_anew(tiny_recipe("a", "b")))
    second = service.submit(measured_anew(tiny_recipe("a", "b")))
    with pytest.raises(httpx.ReadTimeout):
        service.post(f"/jobs/{job['id']}/predict", json={"model": "a", "rows": [SECRET]}, timeout=MOMENT_S)
    wait_until(lambda: "/predict 400" in service.log, "the service to notice that the caller hung up")
    assert meanwhile(service, job, engine.resume).status_code == 200
    assert [service.finished(one)["attempt"] for one in (first, second)] == [1, 1]
    said = [line for line in service.log.splitlines() if "attempt" in line or "to try" in line]
    assert sum("to try" in line for line in said) == tried_before + 1, "rows for which nobody waits take no time"
    ends, tried, begins = (
        max(number for number, line in enumerate(said) if job_id in line and words in line)
        for job_id, words in (
            (first, "the attempt ends"),
            (job["id"], "to try: answered"),
            (second, "the attempt starts"),
        )
    )
    assert ends < tried < begins, said[-8:]


def test_a_dead_engine_costs_no_more_than_the_request(service: Service, job: dict[str, Any]) -> None:
    assert predict(service, job).status_code == 200
    engine = service.processes()["engine"]
    engine.suspend()
    answer = meanwhile(service, job, engine.kill)
    assert_problem(answer, 500, "prediction_failed")
    assert "the engine process ended while it answered; ask again" in answer.json()["detail"]
    assert predict(service, job).status_code == 200
    assert service.job(job["id"]) == job


def test_inputs_that_changed_or_are_gone_are_named(service: Service, job: dict[str, Any]) -> None:
    folder = service.inputs / "checkpoints" / "tried-b"
    edit_json(folder / "config.json", classifier_dropout=0.5)
    answer = predict(service, job)
    assert_problem(answer, 422, "invalid_checkpoint")
    assert "local:checkpoints/tried-b: its files were changed" in answer.json()["detail"]
    folder.rename(folder.with_name("tried-away"))
    assert_problem(predict(service, job), 422, "invalid_checkpoint")
    [artifact] = (service.data_dir / "artifacts").glob(f"{job['id']}.*")
    (artifact / "models" / "a" / "config.json").unlink()
    assert_problem(predict(service, job), 500, "artifact_damaged")
    assert service.post(f"/jobs/{job['id']}/predict", json={"model": "a"}).status_code == 422
    with service.http as http:
        assert http.delete(f"/jobs/{job['id']}").status_code == 204
    assert_problem(predict(service, job), 404, "not_found")
    wait_until(lambda: service.get_or_none("/readyz"), "the worker to live on")
