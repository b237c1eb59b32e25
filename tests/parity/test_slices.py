"""Results that are put together of slices: each layer is merged of those that its slice names, by any method."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.tiny import edit_json, edit_tensors, merge_spec, model_spec, read_model, silent
from tests.tiny_language_models import LLAMA, TinyModel, loaded_model, logits_of, tiny_model
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.jobs.engine import Engine

NAMES = ("base", "one", "two")
OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("slices")
    return {name: tiny_model(root / name, LLAMA, seed=seed, layers=4 + seed) for seed, name in enumerate(NAMES)}


def merged(
    folder: Path,
    models: Mapping[str, Path],
    slices: Sequence[Mapping[str, Any]] | None,
    method: Mapping[str, Any],
    weights: Mapping[str, Any],
    base: str | None = None,
    **output: Any,
) -> Path:
    specs = [model_spec(models[name], weight=weight) for name, weight in weights.items()]
    spec = merge_spec(folder, specs, {"precision": "auto", **method}, **output).model_copy(
        update={
            "slices": None if slices is None else [OutputSlice.model_validate(part) for part in slices],
            "base": None if base is None else CheckpointSpec(source=f"local:{base}", path=models[base]),
        }
    )
    Engine(torch.device("cpu")).merge(spec, silent)
    return folder / "model"


def layer(state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    start = f"model.layers.{number}."
    return {name.removeprefix(start): tensor.double() for name, tensor in state.items() if name.startswith(start)}


def source(model: str, start: int, stop: int) -> dict[str, Any]:
    return {"model": model, "layers": [start, stop]}


def test_each_layer_is_merged_of_the_layers_that_its_slice_names(models: dict[str, Path], tmp_path: Path) -> None:
    slices = [
        {"sources": [source("one", 0, 2), source("two", 3, 5)]},
        {"sources": [source("two", 1, 2)]},
        {"sources": [source("two", 4, 6), source("one", 3, 5)]},
    ]
    weights = {
        "one": [{"filter": "*", "where": [3, 5], "value": [1.0, 3.0]}, {"filter": "*", "value": 0.5}],
        "two": 1.0,
    }
    found = read_model(merged(tmp_path, models, slices, {"name": "linear"}, weights))
    one, two = (read_model(models[name]) for name in ("one", "two"))
    expected: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor], float]] = [
        (layer(one, 0), layer(two, 3), 0.5), (layer(one, 1), layer(two, 4), 0.5), (layer(two, 1), layer(two, 1), 0.0),
        (layer(one, 3), layer(two, 4), 1.0), (layer(one, 4), layer(two, 5), 3.0),
    ]  # fmt: skip
    for number, (first, second, weight) in enumerate(expected):
        of_result = layer(found, number)
        assert of_result.keys() == second.keys()
        for name, tensor in of_result.items():
            wanted = (weight * first[name] + second[name]) / (weight + 1)
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6, msg=f"{number} {name}")
    for name in OUTER:
        wanted = (0.5 * one[name].double() + two[name].double()) / 1.5
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-6)
    assert not layer(found, 5)
    loaded = loaded_model(tmp_path / "model", "LlamaForCausalLM")
    assert loaded.config.num_hidden_layers == 5
    assert torch.isfinite(logits_of(loaded)).all()


def test_task_vectors_go_from_the_layers_of_the_base_that_the_slice_names(
    models: dict[str, Path], tmp_path: Path
) -> None:
    slices = [
        {"sources": [source("one", 0, 1), source("two", 1, 2)], "base_layers": [2, 3]},
        {"sources": [source("one", 4, 5)], "base_layers": [3, 4]},
    ]
    method, weights = {"name": "task_arithmetic", "scale": 0.5}, {"one": 1.0, "two": -0.25}
    found = read_model(merged(tmp_path, models, slices, method, weights, "base"))
    base, one, two = (read_model(models[name]) for name in NAMES)
    for name, tensor in layer(found, 0).items():
        origin = layer(base, 2)[name]
        wanted = origin + 0.5 * (layer(one, 0)[name] - origin - 0.25 * (layer(two, 1)[name] - origin))
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    for name, tensor in layer(found, 1).items():
        wanted = layer(base, 3)[name] + 0.5 * (layer(one, 4)[name] - layer(base, 3)[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)


def test_the_configuration_that_counts_has_the_layers_of_the_slices(models: dict[str, Path], tmp_path: Path) -> None:
    named = {name: tmp_path / name for name in NAMES}
    for name, folder in named.items():
        shutil.copytree(models[name], folder)
    edit_json(named["base"] / "config.json", eos_token_id=5, rms_norm_eps=1e-3, max_position_embeddings=96)
    slices = [{"sources": [source("one", 0, 2)]}, {"sources": [source("two", 1, 4)]}]
    weights = {"one": 1.0, "two": 0.5}
    folder = merged(tmp_path / "out", named, slices, {"name": "task_arithmetic"}, weights, "base", config_from="base")
    config = loaded_model(folder, "LlamaForCausalLM").config
    assert (config.num_hidden_layers, config.eos_token_id) == (5, 5)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-3, 96)


@pytest.mark.parametrize("name", ["linear", "passthrough"])
def test_slices_of_several_models_may_take_the_tokens_of_one(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    parts = [source("one", 0, 2), source("two", 1, 4)]
    is_stack = name == "passthrough"
    method = {"name": name, **({"slices": parts} if is_stack else {})}
    slices = None if is_stack else [{"sources": [part]} for part in parts]
    folder = merged(tmp_path, models, slices, method, {"one": 1.0, "two": 1.0}, vocabulary="base", vocabulary_of="two")
    found, one, two = (read_model(path) for path in (folder, models["one"], models["two"]))
    tokens = len(AutoTokenizer.from_pretrained(models["two"]))
    torch.testing.assert_close(found[OUTER[0]][:tokens], one[OUTER[0]][:tokens], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[OUTER[2]][:tokens], two[OUTER[2]][:tokens], rtol=0, atol=1e-6)


def test_a_copy_that_only_the_class_ties_is_left_out(tmp_path: Path) -> None:
    """No rule of names knows XLNet's output matrix."""
    settings = {"d_model": 16, "n_head": 4, "d_inner": 24, "pad_token_id": 0}
    xlnet = TinyModel("XLNetLMHeadModel", "xlnet", settings, layers="n_layer")
    models = {name: tiny_model(tmp_path / name, xlnet, seed=seed) for seed, name in enumerate(NAMES)}
    for folder in models.values():
        edit_tensors(folder, lambda t: {**t, "lm_loss.weight": t["transformer.word_embedding.weight"].clone()})
    slices = [{"sources": [source("one", 0, 2)]}, {"sources": [source("two", 1, 2)]}]
    state = read_model(merged(tmp_path / "out", models, slices, {"name": "linear"}, {"one": 1.0, "two": 1.0}))
    one = read_model(models["one"])
    assert torch.equal(state["transformer.word_embedding.weight"], one["transformer.word_embedding.weight"])
    assert "lm_loss.weight" not in state
    assert torch.equal(state["lm_loss.bias"], read_model(models["two"])["lm_loss.bias"])


def test_all_layers_of_all_models_are_a_merge_like_any_other(models: dict[str, Path], tmp_path: Path) -> None:
    same = {"one": models["one"], "again": models["one"]}
    slices = [{"sources": [{"model": "one"}, {"model": "again", "layers": [0, 5]}]}]
    specs = [model_spec(path, name=name) for name, path in same.items()]
    for number, given in enumerate((slices, None)):
        of = None if given is None else [OutputSlice.model_validate(part) for part in given]
        spec = merge_spec(tmp_path / str(number), specs, {"name": "slerp", "precision": "auto"})
        Engine(torch.device("cpu")).merge(spec.model_copy(update={"slices": of}), silent)
    first, second = (read_model(tmp_path / str(number) / "model") for number in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_kinds_of_layers_may_alone_tell_how_many_there_are(tmp_path: Path) -> None:
    """Of Nemotron-H, transformers saves no number of layers."""
    settings = {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "mamba_num_heads": 8, "mamba_head_dim": 4, "ssm_state_size": 8, "n_groups": 1,
        "hybrid_override_pattern": "M*-M",
    }  # fmt: skip
    hybrid = TinyModel("NemotronHForCausalLM", "nemotron_h", settings)
    models = {"a": tiny_model(tmp_path / "a", hybrid, layers=4)}
    before = json.loads((models["a"] / "config.json").read_text())
    assert "num_hidden_layers" not in before
    method = {"name": "passthrough", "slices": [source("a", 0, 3), source("a", 1, 4)]}
    found = merged(tmp_path / "out", models, None, method, {"a": 1.0})
    kinds = before["layers_block_type"]
    assert json.loads((found / "config.json").read_text())["layers_block_type"] == kinds[:3] + kinds[1:]
    assert len(loaded_model(found, hybrid.architecture).model.layers) == 6


def test_passthrough_multiplies_by_scale_and_copies_the_rest(models: dict[str, Path], tmp_path: Path) -> None:
    method = {
        "name": "passthrough",
        "slices": [{"model": "one"}, {"model": "two", "layers": [2, 4]}],
        "scale": [{"filter": "*down_proj*", "where": [5, 7], "value": 0.0}, {"filter": "*norm*", "value": -2.0}],
    }
    found = read_model(merged(tmp_path, models, None, method, {"one": 1.0, "two": 1.0}))
    one, two = read_model(models["one"]), read_model(models["two"])
    for number in range(7):
        of = layer(one, number) if number < 5 else layer(two, number - 3)
        for name, tensor in layer(found, number).items():
            scale = 0.0 if "down_proj" in name and number >= 5 else -2.0 if "norm" in name else 1.0
            assert torch.equal(tensor, of[name] * scale), (number, name)
    assert torch.equal(found["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], -2 * two["model.norm.weight"])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 7
