"""Language models, and other architectures without a table, on the running service."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.client import Client
from tests.conftest import Service, assert_problem, tiny_recipe
from tests.tiny import edit_json, read_model, tiny_checkpoint
from tests.tiny_language_models import GPT2, MARKS, ROTARY, TinyModel, loaded_model, logits_of, tiny_model
from worker.engine.catalog.planning.memory import RUNTIME_BYTES

Recipe = dict[str, Any]
WITHOUT_TABLE = TinyModel("StableLmForCausalLM", "stablelm", {**ROTARY, **MARKS})


@pytest.fixture(scope="module")
def inputs(tiny_inputs: Path) -> Path:
    """`lm-0`, the ancestor, `lm-1` and `lm-2` beside the service's other inputs, `gpt`, `bare-…` and `named-…`."""
    folder = tiny_inputs / "checkpoints"
    for seed in range(3):
        tiny_model(folder / f"lm-{seed}", seed=seed, max_shard_size="6KB")
    tiny_model(folder / "gpt", GPT2)
    for seed in (1, 2):
        tiny_model(folder / f"bare-{seed}", WITHOUT_TABLE, seed=seed)
    tiny_checkpoint(folder / "named-ab", names=["a", "b"])
    tiny_checkpoint(folder / "named-ba", names=["b", "a"], seed=1)
    return tiny_inputs


def recipe(*names: str, method: Recipe | None = None, **more: Any) -> Recipe:
    models = [{"name": name, "checkpoint": f"local:checkpoints/{name}"} for name in names or ("lm-1", "lm-2")]
    return {"method": method or {"name": "average"}, "models": models, **more}


def downloaded(service: Service, job: Recipe, folder: Path) -> Path:
    assert job["status"] == "succeeded", job["error"]
    with Client(f"http://127.0.0.1:{service.port}") as client:
        client.download(job["id"], folder)
    return folder


def test_a_merge_of_language_models_is_one_model_that_loads(service: Service, inputs: Path, tmp_path: Path) -> None:
    job = service.finished(
        service.submit(recipe(method={"name": "task_arithmetic", "scale": 0.5}, base="local:checkpoints/lm-0"))
    )
    folder = downloaded(service, job, tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "model", "README.md", "manifest.json", "provenance.json", "recipe.json", "report.html", "report.json",
    }  # fmt: skip
    base, first, second = (read_model(inputs / "checkpoints" / f"lm-{seed}") for seed in range(3))
    wanted = {n: b.double() + 0.5 * ((first[n] - b).double() + (second[n] - b).double()) for n, b in base.items()}
    found = read_model(folder / "model")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
    assembled = loaded_model(inputs / "checkpoints" / "lm-1", "LlamaForCausalLM")
    assembled.load_state_dict(wanted)
    logits = logits_of(loaded_model(folder / "model", "AutoModelForCausalLM"))
    torch.testing.assert_close(logits, logits_of(assembled), rtol=1e-4, atol=1e-5)
    assert job["request"]["output"]["heads"] == "merged"
    assert job["request"]["output"]["align_heads"] is False
    assert job["result"]["notes"] == []
    assert job["result"]["metrics"] is None
    again = service.finished(service.submit(json.loads((folder / "recipe.json").read_text())))
    listings = [service.get(f"/jobs/{one['id']}/artifacts").json()["files"] for one in (job, again)]
    first_digests, second_digests = ({f["name"]: f["sha256"] for f in listing} for listing in listings)
    weights = {name for name in first_digests if name.endswith(".safetensors")}
    assert weights
    assert all(name.startswith("model/") and first_digests[name] == second_digests[name] for name in weights)


def test_the_plan_of_a_merge_that_loads_no_model(service: Service, inputs: Path) -> None:
    response = service.post("/merge/validate", json=recipe("bare-1", "bare-2"))
    assert response.status_code == 200, response.text
    plan = response.json()
    names = read_model(inputs / "checkpoints" / "bare-1")
    size = sum(tensor.numel() * tensor.element_size() for tensor in names.values())
    assert (plan["bytes_to_read"], plan["tensors"]) == (2 * size, len(names))
    beside = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    copied = sum((inputs / "checkpoints" / "bare-1" / name).stat().st_size for name in beside)
    assert plan["bytes_to_write"] == size + copied
    assert RUNTIME_BYTES < plan["peak_memory_bytes"] < RUNTIME_BYTES + 500_000_000
    assert plan["examples"] == 0
    assert plan["owners"] == {"rest": len(names)}
    assert plan["models"][0] == {
        "name": "bare-1", "architecture": "StableLmForCausalLM", "task": "text-generation",
        "head": "merged like the rest into model", "tokens": None, "new_tokens": None,
    }  # fmt: skip
    assert plan["request"]["output"]["heads"] == "merged"
    assert plan["aligned_examples"] == 0
    refused = service.post("/merge/validate", json={**recipe("bare-1", "bare-2"), "output": {"alignment_rows": 64}})
    assert_problem(refused, 422, "invalid_request")
    [error] = refused.json()["errors"]
    assert error == {
        "field": "output.alignment_rows",
        "message": "has no effect where heads are merged; leave it out",
    }


def test_layers_stack(service: Service, inputs: Path, tmp_path: Path) -> None:
    slices = [{"model": "lm-1", "layers": [0, 2]}, {"model": "lm-2", "layers": [1, 2]}]
    stacking = recipe(method={"name": "passthrough", "slices": slices}, layers=2)
    refused = service.post("/merge/validate", json={**stacking, "layers": 3})
    assert_problem(refused, 422, "invalid_request")
    assert "the models have 2 layers, the recipe says 3" in refused.json()["detail"]
    assert service.post("/merge/validate", json=stacking).json()["tensors"] == 3 * 9 + 3
    job = service.finished(service.submit(stacking))
    folder = downloaded(service, job, tmp_path)
    found, second = read_model(folder / "model"), read_model(inputs / "checkpoints" / "lm-2")
    last = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(found[last.format(2)], second[last.format(1)])
    assert torch.equal(found["lm_head.weight"], second["lm_head.weight"])
    assert loaded_model(folder / "model", "AutoModelForCausalLM").config.num_hidden_layers == 3


def test_classifiers_of_equal_labels_become_one_where_it_is_asked_for(
    service: Service, inputs: Path, tmp_path: Path
) -> None:
    asked = {**tiny_recipe("a", "c"), "output": {"heads": "merged"}}
    job = service.finished(service.submit(asked))
    folder = downloaded(service, job, tmp_path)
    assert job["request"]["output"]["align_heads"] is False
    assert [model["aligned_examples"] for model in job["result"]["models"]] == [0, 0]
    assert set(job["result"]["metrics"]) == {"a", "c"}
    first, second = (read_model(inputs / "checkpoints" / name)["classifier.weight"] for name in ("a", "c"))
    torch.testing.assert_close(read_model(folder / "model")["classifier.weight"], (first + second) / 2)
    assert not (folder / "models").exists()
    assert tiny_plan(service, tiny_recipe("a", "c"))["request"]["output"]["heads"] == "per_model"


def tiny_plan(service: Service, body: Recipe) -> Recipe:
    plan: Recipe = service.post("/merge/validate", json=body).json()
    return plan


def with_rows(part: str) -> Recipe:
    asked = recipe("bare-1", "bare-2")
    asked["models"][1][part] = {"source": "local:rows/a.jsonl", "label": "label"}
    return asked


def measured(method: str) -> Recipe:
    asked = recipe("bare-1", "bare-2", method={"name": method})
    for model in asked["models"]:
        model["dataset"] = {"source": "local:rows/a.jsonl"}
    return asked


def searched() -> Recipe:
    asked = recipe("bare-1", "bare-2", method={"name": "auto", "candidates": ["average"]})
    for model in asked["models"]:
        model["evaluation"] = {"source": "local:rows/a.jsonl"}
    return asked


def stack(*slices: tuple[str, int, int], **more: Any) -> Recipe:
    parts = [{"model": name, "layers": [start, stop]} for name, start, stop in slices]
    return recipe(method={"name": "passthrough", "slices": parts, **more.pop("method", {})}, **more)


WHOLE = (("lm-1", 0, 2), ("lm-2", 0, 2))
REFUSED: dict[str, tuple[Recipe, str, list[str]]] = {
    "estimates of layers that no table tells": (
        recipe("bare-1", "bare-2", method={"name": "regmean", "gram": "deltas"}, base="local:checkpoints/bare-1"),
        "invalid_checkpoint", ["regmean takes linear layers from a table", "such as ties"],
    ),
    "a method that measures": (
        measured("mask_fisher"), "not_available",
        ["method.name", "mask_fisher", "StableLmForCausalLM", "average, task_arithmetic, ties", "models.0.dataset"],
    ),
    "auto, which evaluates": (
        searched(), "not_available",
        ["method.name", "auto evaluates models", "StableLmForCausalLM", "models.0.evaluation"],
    ),
    "rows to align on": (with_rows("dataset"), "not_available", ["models.1.dataset", "leave it out"]),
    "rows to evaluate on": (with_rows("evaluation"), "not_available", ["models.1.evaluation", "leave it out"]),
    "heads of each": (
        recipe(output={"heads": "per_model"}), "invalid_request",
        ['"field": "output.heads"', "LlamaForCausalLM", "say merged"],
    ),
    "another architecture": (recipe("lm-1", "gpt"), "incompatible_checkpoints", ["llama, gpt2"]),
    "a base of another architecture": (
        recipe(base="local:checkpoints/gpt"), "incompatible_checkpoints", ['"field": "base"', "llama, gpt2"],
    ),
    "heads of other labels": (
        recipe("named-ab", "named-ba", output={"heads": "merged"}), "incompatible_checkpoints",
        ["different labels", "a, b; b, a"],
    ),
    "no slices": (recipe(method={"name": "passthrough"}), "invalid_request", ["method.slices"]),
    "a slice of nothing": (stack(("lm-1", 1, 1), ("lm-2", 0, 2)), "invalid_request", ["layers [1, 1] are none"]),
    "a slice of no model": (
        stack(*WHOLE, ("lm-3", 0, 1)), "invalid_request", ["model 'lm-3'", "did you mean 'lm-"],
    ),
    "a model without a slice": (stack(WHOLE[0]), "invalid_request", ["no slice is of model 'lm-2'"]),
    "layers that are not there": (
        stack(("lm-1", 0, 2), ("lm-2", 0, 3)), "invalid_request",
        ["method.slices.1", "local:checkpoints/lm-2 has 2 layers"],
    ),
    "a base of what is copied": (
        stack(*WHOLE, base="local:checkpoints/lm-0"), "invalid_request", ["a base would have no effect"],
    ),
    "heads of each of what is one": (
        stack(*WHOLE, output={"heads": "per_model"}), "invalid_request", ["output.heads", "one model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_job_is_accepted(service: Service, inputs: Path, case: str) -> None:
    asked, code, words = REFUSED[case]
    for path in ("/merge", "/merge/validate"):
        response = service.post(path, json=asked)
        assert_problem(response, 422, code)
        text = json.dumps(response.json())
        assert all(word in text or json.dumps(word)[1:-1] in text for word in words), text


def test_weights_have_no_effect_on_copies(service: Service, inputs: Path) -> None:
    asked = stack(*WHOLE)
    asked["models"][0]["weight"] = 2
    response = service.post("/merge", json=asked)
    assert_problem(response, 422, "invalid_request")
    assert "weight" in response.json()["detail"]


def test_scores_of_a_model_without_a_table_are_refused_by_its_architecture(service: Service, inputs: Path) -> None:
    models = [{"name": "x", "checkpoint": "local:checkpoints/bare-1", "dataset": {"source": "local:rows/a.jsonl"}}]
    response = service.post("/scores", json={"models": models})
    assert_problem(response, 422, "invalid_checkpoint")
    assert "StableLmForCausalLM" in response.json()["detail"]


def test_a_default_that_a_configuration_leaves_out_is_compared_before_the_job_is_accepted(
    service: Service, inputs: Path
) -> None:
    tiny_model(inputs / "checkpoints" / "lm-other", seed=3, rms_norm_eps=0.01)
    plain = inputs / "checkpoints" / "lm-silent"
    tiny_model(plain, seed=4)
    edit_json(plain / "config.json", rms_norm_eps=None)
    for path in ("/merge", "/merge/validate"):
        response = service.post(path, json=recipe("lm-other", "lm-silent"))
        assert response.status_code == 422, response.text
        assert (
            "rms_norm_eps differs in config.json: 0.01, 1e-06; name a model in output.config_from"
            in response.json()["detail"]
        )
    settled = recipe("lm-other", "lm-silent")
    settled = {**settled, "output": {**settled.get("output", {}), "config_from": settled["models"][1]["name"]}}
    response = service.post("/merge/validate", json=settled)
    assert response.status_code == 200, response.text
    [note] = response.json()["notes"]
    assert "rms_norm_eps differs" in note
    job = service.finished(service.submit(settled))
    assert job["status"] == "succeeded"
    assert job["result"]["notes"][0] == note
