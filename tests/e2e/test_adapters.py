"""LoRA adapters over HTTP."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.conftest import Service, assert_problem, tiny_recipe
from tests.tiny import edit_json, tiny_texts
from tests.tiny_adapters import merged_by_peft, tiny_adapter
from tests.tiny_families import TINY_BERT

ADAPTERS = {"lora-a": 2, "lora-b": 3}


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """`checkpoints/lora-a` and `lora-b`, adapters of `base`, and rows for them."""
    for seed, (name, labels) in enumerate(ADAPTERS.items()):
        tiny_adapter(tiny_inputs / "checkpoints" / name, tiny_inputs / "checkpoints" / "base", labels=labels, seed=seed)
        shutil.copy(tiny_inputs / "rows" / f"{name[-1]}.jsonl", tiny_inputs / "rows" / f"{name}.jsonl")
    return tiny_inputs


def recipe(*names: str, **method: Any) -> dict[str, Any]:
    return {**tiny_recipe(*(names or ADAPTERS), **method), "base": "local:checkpoints/base"}


def test_adapters_are_measured_merged_and_compared(service: Service, inputs: Path) -> None:
    plan = service.post("/merge/validate", json=recipe())
    assert plan.status_code == 200, plan.text
    assert [model["task"] for model in plan.json()["models"]] == [
        "classification, 2 outputs",
        "classification, 3 outputs",
    ]
    job = service.finished(service.submit(recipe()))
    assert job["status"] == "succeeded", job["error"]
    assert [model["checkpoint"] for model in job["result"]["models"]] == [f"local:checkpoints/{a}" for a in ADAPTERS]
    assert set(job["result"]["metrics"]) == set(ADAPTERS)
    again = service.finished(service.submit(job["request"]))
    assert [model["digest"] for model in again["result"]["models"]] == [m["digest"] for m in job["result"]["models"]]
    assert all(model["score_cached"] for model in again["result"]["models"])


def test_the_downloaded_merge_of_one_adapter_is_what_peft_makes_of_it(
    service: Service, inputs: Path, tmp_path: Path
) -> None:
    asked = {**recipe("lora-a", name="average"), "output": {"align_heads": False}}
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    for file in service.get(job["links"]["artifacts"]).json()["files"]:
        if file["name"].startswith("models/lora-a/"):
            (tmp_path / Path(file["name"]).name).write_bytes(service.get(file["href"]).content)
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "checkpoints" / "base", num_labels=2)
    expected = merged_by_peft(base, inputs / "checkpoints" / "lora-a")
    encoded = TINY_BERT.tokenizer()(tiny_texts(4), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path)(**encoded).logits
        torch.testing.assert_close(found, expected(**encoded).logits, rtol=0, atol=1e-5)


def test_an_adapter_and_a_whole_model_merge(service: Service, inputs: Path) -> None:
    job = service.finished(service.submit(recipe("lora-b", "a", name="ties")))
    assert job["status"] == "succeeded", job["error"]


def test_an_adapter_without_its_base_is_refused_with_its_name(service: Service, inputs: Path) -> None:
    edit_json(inputs / "checkpoints" / "lora-a" / "adapter_config.json", base_model_name_or_path="org/tiny-bert")
    asked = recipe()
    del asked["base"]
    response = service.post("/merge", json=asked)
    assert_problem(response, 422, "invalid_checkpoint")
    assert "models.0.checkpoint" in response.text
    assert "adapter of org/tiny-bert; name that as base" in response.json()["detail"]


def test_adapters_are_no_models_of_a_stack(service: Service, inputs: Path) -> None:
    slices = [{"model": "lora-a", "layers": [0, 1]}]
    models = [{"name": "lora-a", "checkpoint": "local:checkpoints/lora-a"}]
    asked = {"models": models, "method": {"name": "passthrough", "slices": slices}}
    response = service.post("/merge/validate", json=asked)
    assert_problem(response, 422, "invalid_checkpoint")
    detail = response.json()["detail"]
    assert "method passthrough takes no adapters; merge it into its base first" in detail
    assert "as base" not in detail


def test_adapters_are_neither_bases_nor_scored(service: Service, inputs: Path) -> None:
    response = service.post("/merge", json={**recipe("a"), "base": "local:checkpoints/lora-a"})
    assert_problem(response, 422, "invalid_checkpoint")
    assert '"field": "base"' in response.text
    asked = tiny_recipe("lora-a")
    del asked["models"][0]["evaluation"]
    response = service.post("/scores", json=asked)
    assert_problem(response, 422, "invalid_checkpoint")
    assert "it is an adapter (adapter_config.json); only the models of a merge may be" in response.json()["detail"]


def test_an_adapter_of_a_kind_that_is_not_available_is_refused(service: Service, inputs: Path) -> None:
    folder = Path(shutil.copytree(inputs / "checkpoints" / "lora-a", inputs / "checkpoints" / "lora-dora"))
    edit_json(folder / "adapter_config.json", use_dora=True)
    response = service.post("/merge", json=recipe("lora-dora", name="average"))
    assert_problem(response, 422, "invalid_checkpoint")
    assert "use_dora" in response.json()["detail"]


def test_an_adapter_that_changes_while_its_job_waits_fails_it(service: Service, inputs: Path) -> None:
    folder = Path(shutil.copytree(inputs / "checkpoints" / "lora-a", inputs / "checkpoints" / "lora-fleeting"))
    blocker = service.submit(tiny_recipe("a", "b", "c", examples=200))
    asked = recipe("lora-fleeting", name="average")
    asked["models"] = [{"name": "fleeting", "checkpoint": "local:checkpoints/lora-fleeting"}]
    job_id = service.submit(asked)
    edit_json(folder / "adapter_config.json", lora_alpha=60)
    job = service.finished(job_id)
    assert service.finished(blocker)["status"] == "succeeded"
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_checkpoint")
    assert "changed after the job was accepted" in job["error"]["message"]
