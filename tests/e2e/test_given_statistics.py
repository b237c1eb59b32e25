"""Statistics of models that come from files instead of being measured, over HTTP."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.client import Client
from tests.conftest import Service, assert_problem, tiny_recipe
from tests.parity.test_merging import backbone
from tests.tiny import Tensors, read_model
from tests.tiny_adapters import tiny_adapter
from tests.tiny_language_models import MARKS, ROTARY, TinyModel, tiny_model

Recipe = dict[str, Any]
WITHOUT_TABLE = TinyModel("StableLmForCausalLM", "stablelm", {**ROTARY, **MARKS})
WEIGHT = "bert.encoder.layer.1.attention.self.value.weight"


@pytest.fixture(scope="module")
def information(tiny_inputs: Path) -> dict[str, Tensors]:
    """Squares by model, which `fisher/MODEL.safetensors` has under the checkpoint's names, also for the head."""
    (tiny_inputs / "fisher").mkdir()
    found = {}
    for seed, name in enumerate(("a", "b")):
        drawing = torch.Generator().manual_seed(seed)
        state = load_file(tiny_inputs / "checkpoints" / name / "model.safetensors")
        found[name] = {key: torch.randn(t.shape, generator=drawing).square() for key, t in state.items()}
        save_file(found[name], tiny_inputs / "fisher" / f"{name}.safetensors")
    return found


def recipe(*without_rows: str, **changes: Any) -> Recipe:
    """A merge of a and b by Fisher information, of which files have that of those `without_rows`."""
    measuring = {} if {"a", "b"} <= {*without_rows} else {"examples": 16}
    found = {**tiny_recipe("a", "b", name="fisher", **measuring), "evaluate": False, **changes}
    for model in found["models"]:
        if model["name"] in without_rows:
            del model["dataset"]
            model["statistics"] = {"fisher": f"local:fisher/{model['name']}.safetensors"}
    return found


def merged(service: Service, recipe: Recipe, folder: Path) -> tuple[dict[str, Any], Tensors]:
    """The job, and the backbone that it merged, which is downloaded into `folder`."""
    job = service.finished(service.submit(recipe))
    assert job["status"] == "succeeded", job["error"]
    with Client(service.url) as client:
        client.download(job["id"], folder / job["id"])
    return job, backbone(folder / job["id"] / "models" / "a")


def test_second_moments_of_a_training_run_weigh_each_parameter(
    service: Service, tiny_inputs: Path, information: dict[str, Tensors], tmp_path: Path
) -> None:
    plan = service.post("/merge/validate", json=recipe("a", "b")).json()
    assert (plan["examples"], plan["bytes_to_write"] > 0) == (0, True)
    job, found = merged(service, recipe("a", "b"), tmp_path)
    states = {n: load_file(tiny_inputs / "checkpoints" / n / "model.safetensors") for n in information}
    norms = {n: torch.cat([i[k].double().ravel() for k in found]).norm() for n, i in information.items()}
    for key, tensor in found.items():
        weights = {n: information[n][key].double() / norms[n] for n in information}
        expected = sum(weights[n] * states[n][key].double() for n in information) / sum(weights.values())
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-5)
    for model in job["result"]["models"]:
        content = (tiny_inputs / "fisher" / f"{model['name']}.safetensors").read_bytes()
        given = {
            "source": f"local:fisher/{model['name']}.safetensors",
            "digest": f"sha256:{sha256(content).hexdigest()}",
        }
        assert (model["examples"], model["statistics"]) == (0, {"fisher": given})
    manifest = service.get(f"/jobs/{job['id']}/artifacts/manifest.json").json()
    assert manifest["inputs"]["b"]["statistics"] == job["result"]["models"][1]["statistics"]
    assert any("fisher was read from files, and not measured, of a" in note for note in job["result"]["notes"])
    again, repeated = merged(service, json.loads((tmp_path / job["id"] / "recipe.json").read_text()), tmp_path)
    assert again["request"] == job["request"]
    assert all(torch.equal(repeated[key], tensor) for key, tensor in found.items())


def test_what_the_service_measured_is_a_file_that_it_reads(
    service: Service, tiny_inputs: Path, information: dict[str, Tensors], tmp_path: Path
) -> None:
    """A kept statistic that was downloaded gives the bits that measuring gives, beside a model that is measured."""
    measured, expected = merged(service, recipe(), tmp_path)
    scores = {"method": measured["request"]["method"], "models": tiny_recipe("a")["models"]}
    del scores["models"][0]["evaluation"]
    kept = service.finished(service.post("/scores", json=scores).json()["id"])["result"]["models"][0]["scores"][0]
    (tiny_inputs / "fisher" / "kept.safetensors").write_bytes(service.get(kept["href"]).content)
    asked = recipe("a")
    asked["models"][0]["statistics"]["fisher"] = "local:fisher/kept.safetensors"
    job, found = merged(service, asked, tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [model["examples"] for model in job["result"]["models"]] == [0, 16]


def test_scales_that_nothing_evens_out_lead_the_notes(
    service: Service, information: dict[str, Tensors], tmp_path: Path
) -> None:
    asked = recipe("a")
    asked["method"]["normalize"] = False
    job, _ = merged(service, asked, tmp_path)
    assert job["result"]["notes"][0].startswith("with normalize false models count by the scale")


def test_auto_tries_fisher_with_what_files_have(service: Service, information: dict[str, Tensors]) -> None:
    asked = recipe("a", "b", evaluate=True)
    asked["method"] = {"name": "auto", "candidates": ["average", "fisher"], "trials": 2}
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    assert {"average", "fisher"} <= {candidate["name"] for candidate in job["result"]["candidates"]}


def test_layers_are_refitted_to_rows_of_which_nothing_is_measured(
    service: Service, information: dict[str, Tensors]
) -> None:
    asked = tiny_recipe("a", "b", name="aligned_regmean", start="fisher", examples=16)
    asked["models"][0]["statistics"] = {"fisher": "local:fisher/a.safetensors"}
    job = service.finished(service.submit({**asked, "evaluate": False}))
    assert job["status"] == "succeeded", job["error"]
    assert [model["examples"] for model in job["result"]["models"]] == [0, 16]


def test_models_without_a_table_are_weighed_by_the_names_of_their_tensors(
    service: Service, tiny_inputs: Path, tmp_path: Path
) -> None:
    asked: Recipe = {"method": {"name": "fisher"}, "models": []}
    states, weights = [], []
    for seed in (1, 2):
        state = read_model(tiny_model(tiny_inputs / "checkpoints" / f"untold-{seed}", WITHOUT_TABLE, seed=seed))
        drawing = torch.Generator().manual_seed(seed)
        squares = {name: torch.rand(tensor.shape, generator=drawing) for name, tensor in state.items()}
        save_file(squares, tiny_inputs / f"untold-{seed}.safetensors")
        given = {"fisher": f"local:untold-{seed}.safetensors"}
        asked["models"].append(
            {"name": f"m{seed}", "checkpoint": f"local:checkpoints/untold-{seed}", "statistics": given}
        )
        norm = torch.cat([square.double().ravel() for square in squares.values()]).norm()
        weights.append({name: square.double() / norm for name, square in squares.items()})
        states.append(state)
    job = service.finished(service.submit(asked))
    assert job["status"] == "succeeded", job["error"]
    with Client(service.url) as client:
        client.download(job["id"], tmp_path)
    found = read_model(tmp_path / "model")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        total = weights[0][name] + weights[1][name]
        expected = sum(w[name] * s[name].double() for w, s in zip(weights, states, strict=True)) / total
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-5)
    del asked["models"][1]["statistics"]
    assert "model 'm2' has no dataset" in service.post("/merge", json=asked).json()["detail"]


def test_adapters_have_information_of_the_matrices_that_they_change(
    service: Service, tiny_inputs: Path, information: dict[str, Tensors]
) -> None:
    base = tiny_inputs / "checkpoints" / "base"
    for seed, name in enumerate(("fisher-lora-a", "fisher-lora-b")):
        tiny_adapter(tiny_inputs / "checkpoints" / name, base, labels=2 + seed, seed=seed)
    asked = recipe("a", "b", base="local:checkpoints/base")
    for model in asked["models"]:
        model["checkpoint"] = f"local:checkpoints/fisher-lora-{model['name']}"
    plan = service.post("/merge/validate", json=asked)
    assert plan.status_code == 200, plan.text
    factor = f"base_model.model.{WEIGHT.removesuffix('.weight')}.lora_A.weight"
    save_file({factor: torch.ones(2, 16)}, tiny_inputs / "fisher" / "lora.safetensors")
    asked["models"][0]["statistics"]["fisher"] = "local:fisher/lora.safetensors"
    response = service.post("/merge/validate", json=asked)
    assert_problem(response, 422, "invalid_statistics")
    assert "lora_A" in response.text
    assert "as the base names them" in response.text


def without_one(state: Tensors) -> None:
    del state[WEIGHT]


def misspelt(state: Tensors) -> None:
    state[WEIGHT.replace("value", "vlaue")] = state.pop(WEIGHT)


def of_another_shape(state: Tensors) -> None:
    state[WEIGHT] = state[WEIGHT][:3].clone()


def of_integers(state: Tensors) -> None:
    state[WEIGHT] = state[WEIGHT].int()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without_one, ["statistics local:fisher/bad.safetensors", f"no tensor {WEIGHT}", "has zeros"]),
        (misspelt, ["vlaue", "none of local:checkpoints/a", f"did you mean '{WEIGHT[:40]}"]),
        (of_another_shape, [WEIGHT, "[3, 16]", "[16, 16]"]),
        (of_integers, [WEIGHT, "I32", "not a float"]),
    ],
)
def test_headers_are_refused_at_the_door(
    service: Service,
    tiny_inputs: Path,
    information: dict[str, Tensors],
    edit: Callable[[Tensors], None],
    said: list[str],
) -> None:
    state = dict(information["a"])
    edit(state)
    save_file(state, tiny_inputs / "fisher" / "bad.safetensors")
    asked = recipe("a", "b")
    asked["models"][0]["statistics"]["fisher"] = "local:fisher/bad.safetensors"
    response = service.post("/merge", json=asked)
    assert_problem(response, 422, "invalid_statistics")
    body = response.json()
    assert body["errors"][0]["field"] == "models.0.statistics.fisher"
    assert all(part in body["detail"] for part in said), body["detail"]


@pytest.mark.parametrize(
    ("value", "factor", "said"),
    [
        (float("nan"), 1, "NaN or infinite"),
        (1e200, 1, "too large for float32"),
        (-1e-9, 1, "values below 0"),
        (None, 0, "all values are 0 in float32"),
        (None, 1e-300, "all values are 0 in float32"),
    ],
)
def test_contents_fail_the_job(
    service: Service, tiny_inputs: Path, information: dict[str, Tensors], value: float | None, factor: float, said: str
) -> None:
    state = {key: tensor.double() * factor for key, tensor in information["a"].items()}
    if value is not None:
        state[WEIGHT][3, 5] = value
    save_file(state, tiny_inputs / "fisher" / "bad.safetensors")
    asked = recipe("a", "b")
    asked["models"][0]["statistics"]["fisher"] = "local:fisher/bad.safetensors"
    job = service.finished(service.submit(asked))
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_statistics")
    assert said in job["error"]["message"]
    assert job["error"]["detail"]["field"] == "models.0.statistics.fisher"
    assert "local:fisher/bad.safetensors" in job["error"]["message"]
    assert value is None or f"tensor {WEIGHT} in bad.safetensors" in job["error"]["message"]


@pytest.mark.parametrize(
    ("statistics", "method", "code", "said"),
    [
        ({"fischer": "local:fisher/a.safetensors"}, {}, "invalid_request", "did you mean 'fisher'?"),
        ({"fisher": "local:fisher/a.safetensors"}, {"name": "average"}, "invalid_request", "Methods that do: fisher"),
        ({"fisher": "local:fisher/none.safetensors"}, {}, "invalid_request", "does not exist"),
        ({"fisher": "fisher/a.safetensors"}, {}, "invalid_request", "local:PATH"),
        ({"fisher": "local:rows/a.jsonl"}, {}, "invalid_statistics", "no .safetensors file"),
        ({"fisher": "local:rows"}, {}, "invalid_statistics", "neither model.safetensors nor"),
        ({"fisher": f"job:{'0' * 28}/a"}, {}, "invalid_request", "GET /scores"),
        ({}, {}, "invalid_request", "model 'a' has no dataset"),
        (
            {"fisher": "local:fisher/a.safetensors"},
            {"name": "aligned_regmean", "start": "fisher"},
            "invalid_request",
            "model 'a' has no dataset, and method aligned_regmean",
        ),
    ],
)
def test_references_are_refused_by_name(
    service: Service,
    information: dict[str, Tensors],
    statistics: dict[str, str],
    method: dict[str, str],
    code: str,
    said: str,
) -> None:
    asked = recipe("a", "b")
    asked["method"] = method or asked["method"]
    asked["models"][0]["statistics"] = statistics
    response = service.post("/merge", json=asked)
    assert_problem(response, 422, code)
    assert said in response.text
