"""Recipes of mergekit, as its documentation and its users write them, in our own terms."""

import sys
from typing import Any

import pytest

from app.contracts.requests import MergeRequest
from app.services.mergekit import MergekitError, fields_there, translated
from app.services.mergekit.known import TRANSLATED
from app.services.mergekit.models import names_of
from app.services.yaml_text import parse_yaml
from worker.engine.catalog.checkpoints.tensor_names import place_of
from worker.engine.catalog.methods import METHODS, PassthroughParameters
from worker.engine.catalog.primitives.tokens import TokenSource
from worker.engine.catalog.primitives.values import value_at

# All that mergekit 0.1.5 registers.
OF_MERGEKIT = {
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher",
    "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
    "task_arithmetic", "ties",
}  # fmt: skip


def test_every_method_that_mergekit_has_too_can_be_translated() -> None:
    assert METHODS.keys() & OF_MERGEKIT <= TRANSLATED.keys() <= OF_MERGEKIT


TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  density: 0.5
  normalize: true
  int8_mask: true
dtype: float16
"""
TASK_ARITHMETIC = """
merge_method: task_arithmetic
base_model: local:base
models:
  - model: local:base
  - model: local:some/where/a
    parameters: {weight: 0.5}
  - model: job:1234/b
    parameters: {weight: "1e-1"}
parameters:
  lambda: 0.7
tokenizer_source: base
out_dtype: torch.bfloat16
dtype: float32
"""
SLERP = """
slices:
  - sources:
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
LINEAR = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B@refs/pr/1
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""
DARE_TIES = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters: {density: 0.53, weight: 0.4}
  - model: abacusai/Slerp-CM-mist-dpo
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
tokenizer: {source: union}
"""
DELLA = """
models:
  - model: a/one
    parameters: {weight: 0.7, density: 0.6}
  - model: a/two
    parameters: {weight: 0.3, density: 0.6}
merge_method: della
base_model: a/base
parameters: {epsilon: 0.05, lambda: 1.1}
"""
NUSLERP = """
models:
  - {model: a/one, parameters: {weight: 0.7}}
  - {model: a/two, parameters: {weight: 0.3}}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
"""
MODEL_STOCK = """
models: [{model: a/one}, {model: a/two}, {model: b/two}]
merge_method: model_stock
base_model: a/base
"""
KARCHER = "{models: [{model: a/one}, {model: a/two}], merge_method: karcher, parameters: {max_iter: 20}}"
SCE = """
models: [{model: a/one}, {model: a/two}]
merge_method: sce
base_model: a/base
parameters: {select_topk: 0.1}
"""
BREADCRUMBS = """
models:
  - {model: a/one, parameters: {weight: 0.7, density: 0.9, gamma: 0.02}}
  - {model: a/two, parameters: {weight: 0.3, density: 0.9, gamma: 0.02}}
merge_method: breadcrumbs
base_model: a/base
"""
MULTISLERP = """
models:
  - {model: a/one, parameters: {weight: 0.7}}
  - {model: a/two, parameters: {weight: 0.3}}
merge_method: multislerp
base_model: a/base
parameters: {eps: 1e-6}
"""
NEARSWAP = """
models: [{model: a/base}, {model: a/one}]
merge_method: nearswap
base_model: a/base
parameters: {t: 0.0001}
"""
ARCEE_FUSION = "{models: [{model: a/one}], merge_method: arcee_fusion, base_model: a/base}"
RAM = "{models: [{model: a/one}, {model: a/two}], merge_method: ram, base_model: a/base}"
RAMPLUS_TL = """
models: [{model: a/one}, {model: a/two}]
merge_method: ramplus_tl
base_model: a/base
parameters: {r: 0.3}
"""
PASSTHROUGH = """
slices:
  - sources: [{model: a/one, layer_range: [0, 32]}]
  - sources: [{model: b/one, layer_range: [24, 32]}]
  - sources: [{model: a/one, layer_range: [8, 16]}]
merge_method: passthrough
dtype: bfloat16
"""
RECIPES = {
    parse_yaml(text.encode())["merge_method"]: text
    for text in (
        TIES, TASK_ARITHMETIC, SLERP, LINEAR, DARE_TIES, DELLA, NUSLERP, MODEL_STOCK, KARCHER, SCE, BREADCRUMBS,
        MULTISLERP, NEARSWAP, ARCEE_FUSION, RAM, RAMPLUS_TL, PASSTHROUGH,
    )
}  # fmt: skip


def model(name: str, checkpoint: str, weight: Any = 1.0) -> dict[str, Any]:
    return {"name": name, "checkpoint": checkpoint, "weight": weight}


def gradient(values: list[float], pattern: str = "*") -> list[dict[str, Any]]:
    """Of layers alone; what lies outside of them has the first value."""
    return [{"filter": pattern, "value": values, "where": "layers"}, {"filter": pattern, "value": values[0]}]


ONE_TWO = [model("one", "hf:a/one"), model("two", "hf:a/two")]
WEIGHTED = [model("one", "hf:a/one", 0.7), model("two", "hf:a/two", 0.3)]
MEANT: dict[str, dict[str, Any]] = {
    "ties": {
        "method": {"scale": 1.0, "density": 0.5, "normalize": True},
        "models": [
            model("orca_mini_v3_13b", "hf:psmathur/orca_mini_v3_13b"),
            model("Platypus2-13B", "hf:garage-bAInd/Platypus2-13B", gradient([0.0, 0.3, 0.7, 1.0])),
            model(
                "WizardMath-13B-V1.0",
                "hf:WizardLM/WizardMath-13B-V1.0",
                [{"filter": "*mlp*", "value": 0.5}, {"filter": "*", "value": 0.0}],
            ),
        ],
        "base": "hf:TheBloke/Llama-2-13B-fp16",
        "output": {"dtype": "float16", "vocabulary": "error"},
    },
    "task_arithmetic": {
        "method": {"scale": 0.7, "normalize": False},
        "models": [model("a", "local:some/where/a", 0.5), model("b", "job:1234/b", 0.1)],
        "base": "local:base",
        "output": {"dtype": "bfloat16", "vocabulary": "base"},
    },
    "slerp": {
        "method": {
            "t": [
                *gradient([0.0, 0.5, 0.3, 0.7, 1.0], "*self_attn*"),
                *gradient([1.0, 0.5, 0.7, 0.3, 0.0], "*mlp*"),
                {"filter": "*", "value": 0.5},
            ]
        },
        "models": [
            model("orca_mini_v3_13b", "hf:psmathur/orca_mini_v3_13b"),
            model("Platypus2-13B", "hf:garage-bAInd/Platypus2-13B"),
        ],
        "slices": [
            {
                "sources": [
                    {"model": "orca_mini_v3_13b", "layers": [0, 40]},
                    {"model": "Platypus2-13B", "layers": [0, 40]},
                ]
            }
        ],
        "output": {"dtype": "float16", "vocabulary": "error"},
    },
    "linear": {
        "method": {"normalize": True},
        "models": [
            model("orca_mini_v3_13b", "hf:psmathur/orca_mini_v3_13b"),
            model("WizardLM-13B-V1.2", "hf:WizardLM/WizardLM-13B-V1.2", 0.3),
            model("Platypus2-13B", "hf:garage-bAInd/Platypus2-13B@refs/pr/1", 0.5),
        ],
        "output": {"dtype": "float16", "vocabulary": "error"},
    },
    "dare_ties": {
        "method": {"scale": 1.0, "density": 0.53, "normalize": False},
        "models": [
            model("SamirGPT-v1", "hf:samir-fama/SamirGPT-v1", 0.4),
            model("Slerp-CM-mist-dpo", "hf:abacusai/Slerp-CM-mist-dpo", 0.3),
        ],
        "base": "hf:mistralai/Mistral-7B-v0.1",
        "output": {"dtype": "bfloat16", "vocabulary": "union"},
    },
    "della": {
        "method": {"scale": 1.1, "density": 0.6, "epsilon": 0.05, "normalize": True},
        "models": WEIGHTED,
        "base": "hf:a/base",
    },
    "nuslerp": {"method": {"vectors": "columns"}, "models": WEIGHTED},
    "model_stock": {
        "method": {"filter_wise": False},
        "models": [*ONE_TWO, model("two-2", "hf:b/two")],
        "base": "hf:a/base",
    },
    "karcher": {"method": {"max_iter": 20, "tol": 1e-5}, "models": ONE_TWO},
    "sce": {"method": {"select_topk": 0.1}, "models": ONE_TWO, "base": "hf:a/base"},
    "breadcrumbs": {
        "method": {"scale": 1.0, "density": 0.9, "gamma": 0.02, "normalize": False},
        "models": WEIGHTED,
        "base": "hf:a/base",
    },
    "multislerp": {
        "method": {"normalize_weights": True, "eps": 1e-6},
        "models": WEIGHTED,
        "base": "hf:a/base",
    },
    "nearswap": {"method": {"t": 0.0001}, "models": ONE_TWO[:1], "base": "hf:a/base"},
    "arcee_fusion": {"models": ONE_TWO[:1], "base": "hf:a/base"},
    "ram": {"method": {"epsilon": 1e-5}, "models": ONE_TWO, "base": "hf:a/base"},
    "ramplus_tl": {
        "method": {"epsilon": 1e-5, "r": 0.3, "alpha": 0.2},
        "models": ONE_TWO,
        "base": "hf:a/base",
    },
    "passthrough": {
        "method": {
            "slices": [
                {"model": "one", "layers": [0, 32]},
                {"model": "one-2", "layers": [24, 32]},
                {"model": "one", "layers": [8, 16]},
            ]
        },
        "models": [model("one", "hf:a/one"), model("one-2", "hf:b/one")],
        "output": {"dtype": "bfloat16", "vocabulary": "error"},
    },
}
HERE = [name for name in RECIPES if name in METHODS]  # a method that is added here is tested from then on


@pytest.mark.parametrize("name", HERE)
def test_a_recipe_says_here_what_it_says_there(name: str) -> None:
    found = translated(parse_yaml(RECIPES[name].encode()))
    meant = {"output": {"dtype": "auto", "vocabulary": "error"}, **MEANT[name]}
    fields = METHODS[name].parameters.model_fields
    assert found.pop("method") == {"name": name, **{k: v for k, v in meant.get("method", {}).items() if k in fields}}
    whose = None
    if "base_model" in parse_yaml(RECIPES[name].encode()) and name != "passthrough":
        whose = "base" if "base" in meant else meant["models"][0]["name"]
    output = found.pop("output")
    assert output.pop("config_from", None) == whose  # the base's settings count where models differ
    assert output == meant["output"] | {"align_heads": False}
    assert found.pop("strict_filters") is False
    assert found == {key: value for key, value in meant.items() if key not in ("method", "output")}


@pytest.mark.parametrize("name", HERE)
def test_a_translation_is_a_request_that_leaves_no_default_to_us(name: str) -> None:
    found = translated(parse_yaml(RECIPES[name].encode()))
    request = MergeRequest.model_validate(found)
    ours = request.method.model_fields_set
    assert ours >= METHODS[name].parameters.model_fields.keys() - {"precision", "seed", "scale"}
    without = ("sce", "model_stock", "ram", "ramplus_tl", "nearswap", "arcee_fusion")
    assert "scale" in ours or not request.method.needs_base or name in without


def changed(**changes: Any) -> dict[str, Any]:
    """A good recipe with other values; None takes a key away."""
    recipe: dict[str, Any] = parse_yaml(TIES.encode())
    return {key: value for key, value in (recipe | changes).items() if value is not None}


def with_model(entry: Any, **changes: Any) -> dict[str, Any]:
    return changed(models=[{"model": "a/one", "parameters": {"weight": 1}}, entry], **changes)


def weights(first: Any, shared: Any) -> Any:
    """Of a model with `first` as its own weight and `shared` as everyone's."""
    parameters = {} if first is None else {"weight": first}
    recipe = changed(models=[{"model": "a/one", "parameters": parameters}], parameters={"weight": shared})
    return translated(recipe)["models"][0]["weight"]


@pytest.mark.parametrize(
    ("first", "shared", "expected"),
    [
        (0.5, 0.7, 0.5),
        (None, 0.7, 0.7),
        ([0.5, 1], 0.7, gradient([0.5, 1.0])),
        ([0.5, -1.5], 0.7, gradient([0.5, -1.5])),
        ({"filter": "mlp", "value": 1}, 0.7, [{"filter": "*mlp*", "value": 1.0}, {"filter": "*", "value": 0.7}]),
        ({"value": 1}, 0.7, [{"filter": "*", "value": 1.0}]),
        (
            [{"filter": "a", "value": 1}],
            [{"filter": "b", "value": [2, 3]}, {"filter": "*", "value": 4}, {"filter": "c", "value": 5}],
            [
                {"filter": "*a*", "value": 1.0},
                *gradient([2.0, 3.0], "*b*"),
                {"filter": "*", "value": 4.0},
            ],
        ),
        ([{"filter": "x[0]*?", "value": "1e-3"}, {"value": 0}], 9, [
            {"filter": "*x[[]0][*][?]*", "value": 0.001}, {"filter": "*", "value": 0.0},
        ]),
    ],
)  # fmt: skip
def test_where_no_filter_of_a_model_matches_everyones_setting_counts(first: Any, shared: Any, expected: Any) -> None:
    assert weights(first, shared) == expected


CANONICAL_TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def test_models_have_densities_of_their_own() -> None:
    found = translated(parse_yaml(CANONICAL_TIES.encode()))
    assert found["method"] == {"name": "ties", "density": 1.0, "normalize": True, "scale": 1.0}
    own = [{"density": gradient([1.0, 0.7, 0.1])}, {"density": 0.5}, {"density": 0.33}]
    assert [model["parameters"] for model in found["models"]] == own
    request = MergeRequest.model_validate(found).model_dump(mode="json")
    assert [model["parameters"] for model in request["models"]] == own


@pytest.mark.parametrize(
    ("first", "shared", "of_all", "own"),
    [
        ({}, {"density": 0.4}, 0.4, [None, {"density": 0.5}]),
        ({"density": 0.5}, {"density": 0.4}, 0.5, [None, None]),
        ({"density": 0.4}, {}, 1.0, [{"density": 0.4}, {"density": 0.5}]),
        (
            {"density": {"filter": "mlp", "value": 1}},
            {"density": 0.4},
            0.4,
            [{"density": [{"filter": "*mlp*", "value": 1.0}, {"filter": "*", "value": 0.4}]}, {"density": 0.5}],
        ),
    ],
)
def test_a_model_has_its_own_value_where_it_is_another(
    first: dict[str, Any], shared: dict[str, Any], of_all: Any, own: list[Any]
) -> None:
    models = [
        {"model": "a/one", "parameters": {"weight": 1, **first}},
        {"model": "a/two", "parameters": {"weight": 1, "density": 0.5}},
    ]
    found = translated(changed(models=models, parameters=shared))
    assert found["method"]["density"] == of_all
    assert [model.get("parameters") for model in found["models"]] == own


def test_a_list_within_the_slice_goes_before_that_of_all() -> None:
    sources = [{"model": f"a/{name}", "layer_range": [0, 12]} for name in ("one", "two")]
    other = {"model": "a/other", "layer_range": [1, 13]}
    one = {"sources": [*sources, other], "base_model": "a/other", "parameters": {"weight": 0.25}}
    found = translated(changed(models=None, slices=[one], parameters={"weight": 0.5, "density": [1, 0.5]}))
    assert [m["weight"] for m in found["models"]] == [0.25, 0.25]
    assert found["base"] == "hf:a/other"
    assert found["method"]["density"] == gradient([1.0, 0.5])
    merged = [{"model": name, "layers": [0, 12]} for name in ("one", "two")]
    assert found["slices"] == [{"base_layers": [1, 13], "sources": merged}]


def test_a_base_that_is_a_model_like_others_comes_first() -> None:
    """Of methods that do not go from it: mergekit merges it too."""
    models = [{"model": "a/one"}, {"model": "a/two"}]
    recipe = {"base_model": "a/base", "models": models, "parameters": {"weight": 0.5}}
    for name in METHODS.keys() & {"linear"}:
        found = translated({"merge_method": name, **recipe})
        assert [m["checkpoint"] for m in found["models"]] == ["hf:a/base", "hf:a/one", "hf:a/two"]
        assert "base" not in found
    found = translated({"merge_method": "ties", **recipe})
    assert [m["checkpoint"] for m in found["models"]] == ["hf:a/one", "hf:a/two"]
    assert found["base"] == "hf:a/base"


@pytest.mark.parametrize("base", ["a/base", "local:some+where/base"])
def test_a_base_with_an_adapter_is_the_adapter(base: str) -> None:
    models = [{"model": f"{base}+b/lora"}, {"model": f"{base}+local:lora"}, {"model": "a/two"}]
    recipe = {"base_model": base, "models": models, "parameters": {"weight": 0.5}}
    adapters, of = ["hf:b/lora", "local:lora", "hf:a/two"], base if ":" in base else f"hf:{base}"
    found = translated({"merge_method": "ties", **recipe})
    assert ([m["checkpoint"] for m in found["models"]], found["base"]) == (adapters, of)
    found = translated({"merge_method": "linear", **recipe})
    assert ([m["checkpoint"] for m in found["models"]], found["base"]) == ([of, *adapters], of)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a method of nobody": (changed(merge_method="frankenmerge"), "merge_method", "'frankenmerge' has no counterpart"),
    "a method with a typo": (changed(merge_method="tie"), "merge_method", "did you mean 'ties'?"),
    "no base": (changed(base_model=None), "base_model", "ties needs it"),
    "models and slices": (changed(slices=[{}]), "models", "either models or slices"),
    "several modules": (changed(models=None, modules={"a": {}, "b": {}}), "modules", "several have no counterpart"),
    "sources of different lengths": (
        changed(
            models=None,
            slices=[{"sources": [{"model": f"a/{i}", "layer_range": [i, 12]} for i in range(2)]}],
        ),
        "slices.0.sources.1.layer_range",
        "the same number of layers",
    ),
    "a base that is no source of a slice": (
        changed(models=None, slices=[{"sources": [{"model": "a/b", "layer_range": [0, 2]}]}]), "slices.0.sources",
        "needs base_model among them",
    ),
    "two bases": (
        changed(models=None, slices=[
            {"base_model": f"a/{i}", "sources": [{"model": f"a/{n}", "layer_range": [0, 2]} for n in range(2)],
             "parameters": {"weight": 1}}
            for i in range(2)
        ]),
        "slices.1.base_model", "from one base",
    ),
    "a layer's number in a slice that numbers layers anew": (
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a/b", "layer_range": [2, 4], "parameters": {
                "scale": {"filter": "layers.3.", "value": 0},
            }}]}],
        },
        "slices.0.sources.0.parameters.scale", "numbers layers anew",
    ),
    "several whole models in passthrough": (
        {"merge_method": "passthrough", "models": [{"model": "a/b"}, {"model": "a/c"}]}, "models", "one model in each",
    ),
    "neither": (changed(models=None), "models", "either models or slices"),
    "an adapter": (with_model({"model": "a/two+b/lora"}), "models.1.model", "the model and 'a/two' as base"),
    "an adapter of a folder": (
        with_model({"model": "local:two+local:lora"}), "models.1.model",
        "'local:lora' is an adapter of 'local:two', which must be the recipe's base_model",
    ),
    "an absolute path": (with_model({"model": "/models/two"}), "models.1.model", "a path of your machine"),
    "a relative path": (with_model({"model": "./two"}), "models.1.model", "a path of your machine"),
    "a base that is a path": (changed(base_model="~/base"), "base_model", "a path of your machine"),
    "a model twice": (with_model({"model": "a/one", "parameters": {"weight": 1}}), "models.0.model", "there twice"),
    "no model": (with_model({"parameters": {}}), "models.1.model", "is missing"),
    "no weight": (with_model({"model": "a/two"}), "models.1.parameters.weight", "needed for every tensor"),
    "no weight for some": (
        with_model({"model": "a/two", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}),
        "models.1.parameters.weight",
        "needed for every tensor",
    ),
    "a weight that is none": (
        with_model({"model": "a/two", "parameters": {"weight": "much"}}), "models.1.parameters.weight", "give a number",
    ),
    "numbers and filters": (
        with_model({"model": "a/two", "parameters": {"weight": [{"value": 1}, 2]}}),
        "models.1.parameters.weight.1",
        "give an entry",
    ),
    "a flag that is none": (changed(parameters={"normalize": [True, False]}), "parameters.normalize", "true or false"),
    "ties that rescales": (changed(parameters={"rescale": True}), "parameters.rescale", "as with rescale: false"),
    "a format that is none": (changed(dtype="int8"), "dtype", "float64, float32, bfloat16, float16"),
    "a tokenizer of another model": (changed(tokenizer_source="a/one"), "tokenizer_source", "is no model of this"),
    "a token of another model": (
        changed(tokenizer={"tokens": {"<x>": {"source": "a/zzz"}}}), "tokenizer.tokens.<x>.source", "is no model",
    ),
    "a chat template of mergekit's": (changed(chat_template="exaone"), "chat_template", "give the template itself"),
    "two tokenizers": (changed(tokenizer={}, tokenizer_source="base"), "tokenizer", "either this or tokenizer_source"),
    "layers that are none": (
        changed(models=None, slices=[{"sources": [{"model": "a/b", "layer_range": [3, 3]}]}]),
        "slices.0.sources.0.layer_range",
        "as [0, 12]",
    ),
    "models that are none": (changed(models="a/b"), "models", "a list"),
    "parameters that are none": (changed(parameters=[1]), "parameters", "a mapping"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "field", "says"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_counterpart_is_refused_by_its_name_there(recipe: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(MergekitError) as refused:
        translated(recipe)
    assert refused.value.field == field
    assert says in refused.value.message


def test_fields_of_the_translation_are_known_by_their_names_there() -> None:
    def known(recipe: dict[str, Any]) -> dict[str, str]:
        return fields_there(recipe, translated(recipe))

    base, one, two = ({"model": f"a/{name}", "parameters": {"weight": 1}} for name in ("base", "one", "two"))
    one["parameters"] = {"weight": 1, "density": 0.5}
    recipe = {
        "merge_method": "ties",
        "base_model": "a/base",
        "models": [base, one, two],
        "parameters": {"density": 0.3, "lambda": 2},
        "out_dtype": "float16",
    }
    found = known(recipe)
    assert found["base"] == "base_model"
    assert found["method.density"] == "parameters.density"
    assert found["method.scale"] == "parameters.lambda"
    assert found["output.dtype"] == "out_dtype"
    assert found["models.0.checkpoint"] == "models.1.model"
    assert found["models.0.parameters.density"] == "models.1.parameters.density"
    assert found["models.1.weight"] == "models.2.parameters.weight"

    sources = [{"model": f"a/{name}", "layer_range": [0, 12]} for name in ("two", "one")]
    recipe = {
        "merge_method": "slerp",
        "base_model": "a/one",
        "slices": [{"sources": sources}],
        "parameters": {"t": 0.5},
    }
    found = known(recipe)
    assert found["models.0.checkpoint"] == "slices.0.sources.1.model"
    assert found["slices.0"] == "slices.0"
    assert found["slices.0.sources.0"] == "slices.0.sources.1.layer_range"

    found = known({"merge_method": "linear", "base_model": "a/base", "models": [two], "parameters": {"weight": 1}})
    assert found["models.0.checkpoint"] == "base_model"
    assert found["models.0.weight"] == "parameters.weight"

    stack = [{"sources": [{"model": f"a/{name}", "layer_range": [0, 2]}]} for name in ("two", "one", "two")]
    found = known({"merge_method": "passthrough", "slices": stack})
    assert found["method.slices.2"] == "slices.2.sources.0.layer_range"
    assert found["models.1.checkpoint"] == "slices.1.sources.0.model"


def test_names_are_short_and_unique() -> None:
    references = ["hf:a/model@main", "hf:b/model", "local:x/model/", "local:ä ö", "job:1/..", "local:" + "x" * 100]
    assert names_of(references) == ["model", "model-2", "model-3", "---", "model-4", "x" * 60]


# --- numbers -----------------------------------------------------------------------------------------


def value_there(setting: Any, name: str, t: float) -> float | None:
    """As mergekit evaluates a parameter for one tensor; None where no filter matches."""
    setting = [setting] if isinstance(setting, dict) else setting
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        for entry in setting:
            if entry.get("filter") in (None, "*") or entry["filter"] in name:
                return value_there(entry["value"], name, t)
        return None
    if not isinstance(setting, list):
        return float(setting)
    at = t * (len(setting) - 1)
    index = int(at)
    last = min(index + 1, len(setting) - 1)
    return float((1 - (at - index)) * setting[index] + (at - index) * setting[last])


def number_there(
    recipe: dict[str, Any], key: str, default: float, layer: int | None, name: str, of: str | None
) -> float:
    """A parameter of the recipe for a tensor of the result, in its layer or outside of them, of a model or of all."""
    length, number, t = 0, 0, 0.0
    slices = recipe.get("slices") or [{"sources": [{**m, "layer_range": [0, LAYERS]} for m in recipe["models"]]}]
    for part in slices:
        start, stop = part["sources"][0]["layer_range"]
        if layer is not None and layer < length + stop - start:
            t = (layer - length) / (stop - start - 1) if stop - start > 1 else 1.0
            break
        length, number = length + stop - start, number + 1
    part = slices[number if layer is not None else -1 if name.startswith("lm_head") else 0]
    chain = [source.get("parameters", {}) for source in part["sources"] if source["model"] == of]
    for given in [*chain, part.get("parameters", {}), recipe.get("parameters", {})]:
        value = value_there(given[key], name, t) if key in given else None
        if value is not None:
            return value
    return default


LAYERS = 3
G = [0.1, 0.7, -0.4, 0.9]
BY_TENSOR: dict[str, dict[str, Any]] = {
    "a list": {"models": [{"model": "a/one", "parameters": {"weight": G}}, {"model": "a/two"}],
               "parameters": {"weight": [{"filter": "mlp", "value": [0.5, 1.5]}, {"value": 0.3}]}},
    "a list of one": {"models": [{"model": "a/one"}, {"model": "a/two"}], "parameters": {"weight": [0.7]}},
    "slices": {
        "slices": [
            {"sources": [
                {"model": "a/one", "layer_range": [0, 2], "parameters": {"weight": G}},
                {"model": "a/two", "layer_range": [4, 6]},
            ]},
            {"sources": [
                {"model": "a/three", "layer_range": [1, 2], "parameters": {"weight": [0.25, 0.5]}},
                {"model": "a/one", "layer_range": [7, 8]},
            ], "parameters": {"weight": [{"filter": "mlp", "value": G}, {"filter": "lm_head", "value": [2, 3]}]}},
            {"sources": [
                {"model": "a/two", "layer_range": [3, 6], "parameters": {"weight": {"filter": "norm", "value": 4}}},
                {"model": "a/three", "layer_range": [3, 6]},
            ], "parameters": {"weight": [5, 6]}},
        ],
        "parameters": {"weight": G},
    },
    "slices alike": {
        "slices": [
            {"sources": [{"model": f"a/{m}", "layer_range": [i, i + 2]} for m in ("one", "two")]} for i in (0, 2)
        ],
        "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 2}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("case", BY_TENSOR)
def test_every_tensor_has_mergekits_number(case: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", layers)
    recipe = {"merge_method": "linear", **BY_TENSOR[case]}
    slices = recipe.get("slices", [])
    count = sum(p["sources"][0]["layer_range"][1] - p["sources"][0]["layer_range"][0] for p in slices) or layers
    request = MergeRequest.model_validate(translated(recipe))
    names: list[tuple[int | None, str]] = [(None, "model.embed_tokens.weight"), (None, "lm_head.weight")]
    names += [(i, f"model.layers.{i}.{inner}.weight") for i in range(count) for inner in ("mlp.up_proj", "norm")]
    seen = 0
    for layer, name in names:
        place = place_of(name, {"model.layers": count})
        start = 0
        for part in slices:  # the models of this tensor
            length = part["sources"][0]["layer_range"][1] - part["sources"][0]["layer_range"][0]
            if start <= (layer if layer is not None else 0 if "embed" in name else count - 1) < start + length:
                break
            start += length
        there = {s["model"] for s in part["sources"]} if slices else {m["model"] for m in recipe["models"]}
        for model in request.models:
            of = model.checkpoint.removeprefix("hf:")
            if of in there:
                expected = number_there(recipe, "weight", 1.0, layer, name, of)
                assert value_at(model.weight, place, 1.0) == pytest.approx(expected), (name, of)
                seen += 1
    assert seen == 2 * len(names)


def test_what_mergekit_passes_over_is_noted() -> None:
    recipe = changed(
        base_modle="a/b",
        name="mine",
        parameters={"t": 0.5, "int8_mask": True, "densty": 0.3, "normalize": True},
    )
    recipe["models"][0]["parameters"]["lambda_"] = 2
    recipe["models"][0]["layer_range"] = [0, 4]
    found = translated(recipe)
    passed_over = "mergekit passes over it, and so does this merge"
    assert found["notes"] == [
        f"base_modle: {passed_over}; did you mean 'base_model'?",
        f"name: {passed_over}",
        f"models.0.layer_range: {passed_over}",
        f"parameters.t: {passed_over}",
        f"parameters.densty: {passed_over}; did you mean 'density'?",
        f"models.0.parameters.lambda_: {passed_over}; did you mean 'lambda'?",
    ]
    assert MergeRequest.model_validate(found).notes == found["notes"]
    assert "notes" not in translated(changed())


def test_slices_of_several_models_are_slices_here() -> None:
    slices = [
        {"sources": [{"model": "a/base", "layer_range": [0, 2]}, {"model": "a/one", "layer_range": [0, 2]}]},
        {"sources": [{"model": "a/two", "layer_range": [5, 8]}, {"model": "a/base", "layer_range": [4, 7]}]},
    ]
    slerp = translated({"merge_method": "slerp", "base_model": "a/base", "slices": slices, "parameters": {"t": 0.25}})
    assert slerp["method"] == {"name": "slerp", "t": 0.25}
    assert slerp["slices"] == [
        {"sources": [{"model": "base", "layers": [0, 2]}, {"model": "one", "layers": [0, 2]}]},
        {"sources": [{"model": "base", "layers": [4, 7]}, {"model": "two", "layers": [5, 8]}]},
    ]
    ties = translated({"merge_method": "ties", "base_model": "a/base", "slices": slices, "parameters": {"weight": 1}})
    assert ties["slices"] == [
        {"base_layers": [0, 2], "sources": [{"model": "one", "layers": [0, 2]}]},
        {"base_layers": [4, 7], "sources": [{"model": "two", "layers": [5, 8]}]},
    ]
    assert ties["base"] == "hf:a/base"
    for found in (slerp, ties):
        assert MergeRequest.model_validate(found).slices is not None


def part(*models: str) -> dict[str, Any]:
    return {"sources": [{"model": f"a/{name}", "layer_range": [0, 2], "parameters": {"weight": 1}} for name in models]}


@pytest.mark.parametrize(
    ("recipe", "whose"),
    [
        ({"merge_method": "ties", "slices": [part("base", "one"), part("two", "base")]}, "base"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}, "slices": [part("one", "base")]}, "base"),
        ({"merge_method": "linear", "slices": [part("one", "two"), part("two", "base")]}, "base"),
        ({"merge_method": "passthrough", "slices": [part("one"), part("base")]}, "base"),
        ({"merge_method": "passthrough", "slices": [part("one"), part("two")]}, None),
        ({"merge_method": "linear", "slices": [part("one", "two")]}, None),
    ],
)
def test_the_base_gives_the_configuration_wherever_it_is_read(recipe: dict[str, Any], whose: str | None) -> None:
    recipe = {"base_model": "a/base", **recipe}
    found = translated(recipe)
    assert found["output"].get("config_from") == whose
    assert any(note.startswith("base_model: ") for note in found.get("notes", [])) is (whose is None)
    assert MergeRequest.model_validate(found).output.config_from == whose
    assert fields_there(recipe, found)["output.config_from"] == "base_model"


def test_a_model_with_the_name_base_is_not_taken_for_the_base() -> None:
    models = [{"model": f"{owner}/base", "parameters": {"weight": 1}} for owner in ("b", "c")]
    found = translated({"merge_method": "ties", "base_model": "a/base", "models": models})
    assert [one["name"] for one in found["models"]] == ["base-2", "base-3"]
    assert (found["base"], found["output"]["config_from"]) == ("hf:a/base", "base")


def test_the_tokenizer_of_stacked_layers_is_the_bases() -> None:
    recipe = {"merge_method": "passthrough", "tokenizer_source": "base", "base_model": "a/two"}
    found = translated({**recipe, "slices": [part("one"), part("two")]})
    assert "base" not in found
    assert found["output"]["vocabulary_of"] == found["output"]["config_from"] == "two"
    MergeRequest.model_validate(found)


def test_passthrough_of_slices_has_scales() -> None:
    zeroed = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    slices = [
        {"sources": [{"model": "a/one", "layer_range": [0, 8]}]},
        {"sources": [{"model": "a/one", "layer_range": [4, 8], "parameters": {"scale": zeroed}}]},
        {"sources": [{"model": "a/one", "layer_range": [8, 12], "parameters": {"scale": None}}]},
    ]
    found = MergeRequest.model_validate(translated({"merge_method": "passthrough", "slices": slices})).method
    assert isinstance(found, PassthroughParameters)
    stacks = {"model.layers": 16}
    for layer in range(16):
        for inner, zero in (("self_attn.o_proj", True), ("mlp.down_proj", True), ("mlp.up_proj", False)):
            place = place_of(f"model.layers.{layer}.{inner}.weight", stacks)
            assert found.at("scale", place) == (0 if zero and 8 <= layer < 12 else 1)
    assert found.at("scale", place_of("model.embed_tokens.weight", stacks)) == 1
    whole = {"merge_method": "passthrough", "models": [{"model": "a/one", "parameters": {"scale": 2}}]}
    assert translated(whole)["method"] == {"name": "passthrough", "slices": [{"model": "one"}], "scale": 2.0}


def test_the_bases_row_is_that_of_a_token_that_a_model_lacks() -> None:
    recipe = {"base_model": "a/base", "models": [{"model": "a/one"}], "parameters": {"weight": 0.5}}
    found = translated({"merge_method": "linear", **recipe, "tokenizer_source": "union"})
    assert ([m["checkpoint"] for m in found["models"]], found["base"]) == (["hf:a/base", "hf:a/one"], "hf:a/base")
    assert "base" not in translated({"merge_method": "linear", **recipe})


@pytest.mark.parametrize(("word", "value"), [("on", True), ("Yes", True), ("off", False), ("NO", False), ("0", None)])
def test_words_that_yaml_1_1_takes_for_true_and_false_are_flags(word: str, value: bool | None) -> None:
    models = [{"model": "a/one", "parameters": {"weight": 1}}]
    tokenizer = f"{{tokens: {{<a>: {{source: a/one, force: {word}}}}}}}"
    for field, text in (
        ("parameters.normalize", f"parameters: {{normalize: {word}}}"),
        ("tokenizer.tokens.<a>.force", f"tokenizer: {tokenizer}"),
    ):
        recipe = {"merge_method": "linear", "models": models, **parse_yaml(text.replace("0", "'0'").encode())}
        if value is None:
            with pytest.raises(MergekitError, match="give true or false") as caught:
                translated(recipe)
            assert caught.value.field == field
        else:
            found = translated(recipe)
            flag = found["output"].get("tokens", {}).get("<a>", found["method"])
            assert flag.get("force", flag.get("normalize")) is value


def test_a_tokenizer_has_rows_of_its_own_and_a_model() -> None:
    models = [{"model": f"a/{name}", "parameters": {"weight": 1}} for name in ("one", "two")]
    tokenizer = {
        "source": "a/two",
        "pad_to_multiple_of": 64,
        "tokens": {
            "<a>": {"source": "a/one"},
            "<b>": {"source": {"kind": "zero"}, "force": True},
            "<c>": {"source": {"kind": "model_token", "model": "a/base", "token_id": 7}},
            "<d>": {"source": {"kind": "model_token", "model": "a/two", "token": "x"}, "force": True},
            "<e>": {},
        },
    }
    recipe = {"merge_method": "ties", "base_model": "a/base", "models": models, "tokenizer": tokenizer}
    found = translated({**recipe, "chat_template": "auto"})
    output = MergeRequest.model_validate(found).output
    assert (output.vocabulary, output.vocabulary_of, output.pad_to_multiple_of) == ("base", "two", 64)
    assert output.chat_template == "auto"
    assert output.tokens == {
        "<a>": TokenSource(source="model", model="one"),
        "<b>": TokenSource(source="zero", force=True),
        "<c>": TokenSource(source="base", id=7),
        "<d>": TokenSource(source="model", model="two", token="x", force=True),
        "<e>": TokenSource(),
    }
    of_base = translated({**recipe, "tokenizer": None, "tokenizer_source": "a/base", "chat_template": "chatml"})[
        "output"
    ]
    assert "vocabulary_of" not in of_base
    assert of_base["vocabulary"] == "base"
    assert "<|im_start|>assistant\\n" in of_base["chat_template"]


def test_the_only_module_is_the_model() -> None:
    inner = {"models": [{"model": "a/one"}, {"model": "a/two"}], "parameters": {"weight": 0.25}}
    found = translated({"merge_method": "linear", "modules": {"default": inner}, "parameters": {"weight": 9}})
    assert [m["weight"] for m in found["models"]] == [0.25, 0.25]


def test_names_without_an_organisation_are_of_the_hub() -> None:
    found = translated({"merge_method": "linear", "models": [{"model": "gpt2", "parameters": {"weight": 1}}]})
    assert found["models"][0]["checkpoint"] == "hf:gpt2"
