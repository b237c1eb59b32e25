"""Values of config.json that no class of transformers takes are refused before a job begins, by their keys."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import edit_json
from tests.tiny_language_models import GPT2, LLAMA, QWEN2, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

REFUSED: list[tuple[TinyModel, dict[str, Any]]] = [
    (LLAMA, {"architectures": "LlamaForCausalLM"}),
    (LLAMA, {"architectures": [{"a": 1}]}),
    (LLAMA, {"pad_token_id": 128}),
    (LLAMA, {"pad_token_id": -129}),
    (LLAMA, {"pad_token_id": "a"}),
    (LLAMA, {"id2label": {"a": "b"}}),
    (LLAMA, {"id2label": [1]}),
    (LLAMA, {"id2label": {"0": ["a"]}}),
    (LLAMA, {"num_labels": "3"}),
    (LLAMA, {"num_labels": 2.5}),
    (LLAMA, {"num_labels": -1}),
    (LLAMA, {"id2label": {"0": "a", "00": "b"}}),
    (LLAMA, {"problem_type": "single_label_classification", "num_labels": 1}),
    (LLAMA, {"problem_type": "single_label_classification", "id2label": {"0": "a"}}),
    (LLAMA, {"attention_dropout": float("inf")}),
    (LLAMA, {"attention_dropout": -0.1}),
    (GPT2, {"resid_pdrop": 1.5}),
    (GPT2, {"embd_pdrop": float("nan")}),
    (LLAMA, {"rms_norm_eps": -1}),
    (LLAMA, {"rms_norm_eps": 0}),
    (LLAMA, {"rms_norm_eps": "small"}),
    (GPT2, {"layer_norm_epsilon": -1e-5}),
    (LLAMA, {"hidden_act": 3}),
    (GPT2, {"activation_function": ["gelu"]}),
    (LLAMA, {"dtype": "float33"}),
    (LLAMA, {"torch_dtype": 16}),
    (QWEN2, {"layer_types": ["full_attention"]}),
    (QWEN2, {"layer_types": "full_attention"}),
    (LLAMA, {"layer_types": ["full_attention"]}),
    (LLAMA, {"max_position_embeddings": 20_000_000}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("values")
    return {model.model_type: tiny_model(root / model.model_type, model) for model in (LLAMA, GPT2, QWEN2)}


def planned(models: dict[str, Path], model: TinyModel, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models[model.model_type], tmp_path / "m"))
    edit_json(folder / "config.json", **changes)
    plan_merge([inspect_checkpoint(folder, "local:m"), inspect_checkpoint(folder, "local:n")])


@pytest.mark.parametrize(("model", "changes"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(
    models: dict[str, Path], tmp_path: Path, model: TinyModel, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        planned(models, model, changes, tmp_path)
    assert next(iter(changes)) in caught.value.message
    assert caught.value.message.startswith("checkpoint local:m:")


@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_labels_that_differ_are_refused_with_both(
    models: dict[str, Path], tmp_path: Path, count: int
) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"num_labels {count}, and 2 names in id2label"):
        planned(models, LLAMA, {"id2label": {"0": "a", "1": "b"}, "num_labels": count}, tmp_path)


@pytest.mark.parametrize("value", [["llama"], {"a": 1}, 3, True])
def test_a_model_type_that_is_no_text_is_refused_in_headers(
    models: dict[str, Path], tmp_path: Path, value: object
) -> None:
    with pytest.raises(InvalidCheckpoint, match="model_type"):
        planned(models, LLAMA, {"model_type": value}, tmp_path)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (LLAMA, {"pad_token_id": -1}),
        (LLAMA, {"pad_token_id": 127}),
        (GPT2, {"pad_token_id": 128}),
        (LLAMA, {"dtype": "auto"}),
        (LLAMA, {"id2label": None}),
        (LLAMA, {"id2label": {"0": 0, "1": 1}}),
        (LLAMA, {"id2label": {"0": "a", "1": "b", "2": "c"}, "num_labels": 3}),
        (LLAMA, {"num_labels": 5}),
        (LLAMA, {"attention_dropout": 1}),
        (LLAMA, {"max_position_embeddings": 10_485_760}),
        (QWEN2, {"layer_types": ["full_attention", "full_attention"]}),
    ],
    ids=str,
)
def test_values_that_real_models_have_are_taken(
    models: dict[str, Path], tmp_path: Path, model: TinyModel, changes: dict[str, Any]
) -> None:
    planned(models, model, changes, tmp_path)
