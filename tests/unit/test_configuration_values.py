"""Values of config.json that no class of transformers takes are refused before a job begins, by their keys."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import edit_json
from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, QWEN2, T5, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.library import architecture, completed
from worker.engine.catalog.checkpoints.settings import check_settings, refused_values
from worker.engine.catalog.planning.plan import MergePlan
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
    (LLAMA, {"layer_types": ["no", "no"]}),
    (LLAMA, {"attention_dropout": 1.5}),
    (GPT2, {"resid_pdrop": -0.1}),
    (LLAMA, {"num_attention_heads": 3}),
    (LLAMA, {"num_attention_heads": 0}),
    (GPT2, {"n_head": 3}),
    (T5, {"feed_forward_proj": "gated-none"}),
    (T5, {"dense_act_fn": "none"}),
    (T5, {"relative_attention_max_distance": 0}),
    (T5, {"relative_attention_max_distance": 16}),
    (T5, {"relative_attention_num_buckets": 3}),
    (LLAMA, {"rope_parameters": {"rope_type": "none", "rope_theta": 10_000.0}}),
    (LLAMA, {"rope_parameters": {"rope_type": 1}}),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}}),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": "2"}}),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    (GPT2, {"rope_scaling": {"type": "linear"}}),
    (LLAMA, {"rope_scaling": {"type": "none"}}),
    (LLAMA, {"rope_scaling": {"rope_type": "none", "factor": 2.0}}),
    (LLAMA, {"per_layer_config": 1}),
    (LLAMA, {"per_layer_config": {"0": {"none": 1}}}),
    (LLAMA, {"sub_configs": {}}),
    (GPT2, {"num_attention_heads": 2}),
    (LLAMA, {"initializer_range": -1.0}),
]
CONTRADICTED: list[tuple[TinyModel, dict[str, Any], str]] = [
    (LLAMA, {"mlp_bias": True}, "no tensor model.layers.0.mlp.down_proj.bias"),
    (LLAMA, {"attention_bias": True}, "no tensor model.layers.0.self_attn.k_proj.bias"),
    (GPT2, {"add_cross_attention": True}, "no tensor transformer.h.0.crossattention.c_attn.bias"),
    (GPT2, {"n_inner": 32}, "by its configuration it would have [32]"),
    (T5, {"is_gated_act": True}, "no tensor decoder.block.0.layer.2.DenseReluDense.wi_0.weight"),
    (T5, {"num_heads": 2}, "by its configuration it would have [8, 16]"),
    (T5, {"d_kv": 8}, "by its configuration it would have [32, 16]"),
    (LLAMA, {"head_dim": 8}, "by its configuration it would have [16, 16]"),
    (QWEN2, {"num_key_value_heads": 4}, "by its configuration it would have [16]"),
]
"""Configurations that contradict the tensors, each with what the message says."""
OF_KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("beit", {"num_hidden_layers": 4, "out_features": ["stage5"]}, "its stages are stem to stage4 (0 to 4)"),
    ("beit", {"num_hidden_layers": 4, "out_indices": [5]}, "its stages are stem to stage4 (0 to 4)"),
    ("convnext", {"depths": [1, 1], "out_indices": [1, -2]}, "names a stage twice"),
    ("convnext", {"out_features": ["stage2", "stage1"]}, "not in the order of the stages"),
    ("convnext", {"out_features": ["stage1"], "out_indices": [2]}, "not the same stages"),
    ("beit", {"pool_scales": [1, "x"]}, "pool_scales with 'x', which is of type text; transformers takes int"),
    ("xlnet", {"d_model": 64, "n_head": 4, "d_head": 8}, "d_head 8, and d_model/n_head is 16"),
    ("wav2vec2", {"conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3]}, "conv_kernel of 1 entries"),
]
OF_CLASSES: list[tuple[str, str, dict[str, Any], str]] = [
    ("whisper", "WhisperForConditionalGeneration", {"encoder_attention_heads": 5}, "does not divide d_model 384"),
    ("segformer", "SegformerForImageClassification", {"depths": [2, 2, 2]}, "and num_encoder_blocks 4"),
    ("longformer", "LongformerForMaskedLM", {"attention_window": [8, 8]}, "and num_hidden_layers 12"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("values")
    return {model.model_type: tiny_model(root / model.model_type, model) for model in (LLAMA, GPT2, QWEN2, T5)}


def planned(models: dict[str, Path], model: TinyModel, changes: dict[str, Any], tmp_path: Path) -> MergePlan:
    folder = Path(shutil.copytree(models[model.model_type], tmp_path / "m"))
    edit_json(folder / "config.json", **changes)
    return plan_merge([inspect_checkpoint(folder, "local:m"), inspect_checkpoint(folder, "local:n")])


@pytest.mark.parametrize(("model", "changes"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(
    models: dict[str, Path], tmp_path: Path, model: TinyModel, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        planned(models, model, changes, tmp_path)
    assert next(iter(changes)) in caught.value.message
    assert caught.value.message.startswith("checkpoint local:m:")


def of_kind(model_type: str, settings: dict[str, Any]) -> CheckpointInfo:
    return CheckpointInfo("local:m", Path(), {"model_type": model_type, **settings}, {}, {}, Path())


@pytest.mark.parametrize(("model_type", "settings", "said"), OF_KINDS)
def test_what_the_class_of_a_configuration_refuses_is_refused_by_its_key(
    model_type: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        check_settings(of_kind(model_type, settings))
    assert said in str(caught.value)


@pytest.mark.parametrize(("model_type", "name", "settings", "said"), OF_CLASSES)
def test_what_the_class_of_a_model_refuses_is_refused_by_its_key(
    model_type: str, name: str, settings: dict[str, Any], said: str
) -> None:
    config = {"model_type": model_type, **settings}
    known = architecture(config, name)
    assert known is not None
    assert said in " ".join(refused_values(config, completed(config), known.refused))
    assert not refused_values({}, completed({"model_type": model_type}), known.refused)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("beit", {"num_hidden_layers": 4, "out_features": ["stage2", "stage4"], "out_indices": [2, -1]}),
        ("mamba2", {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24}),  # Mamba 2 of 130 M parameters
        ("xlnet", {"d_model": 64, "n_head": 4}),
        ("musicgen", {"decoder": {"model_type": "musicgen_decoder", "vocab_size": 8, "pad_token_id": 8}}),
    ],
)
def test_settings_of_real_models_are_taken(model_type: str, settings: dict[str, Any]) -> None:
    info = of_kind(model_type, settings)
    check_settings(info)
    assert info.model_type == model_type


@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_labels_that_differ_are_refused_with_both(
    models: dict[str, Path], tmp_path: Path, count: int
) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"num_labels {count}, and 2 names in id2label"):
        planned(models, LLAMA, {"id2label": {"0": "a", "1": "b"}, "num_labels": count}, tmp_path)


@pytest.mark.parametrize(("model", "changes", "words"), CONTRADICTED, ids=str)
def test_a_configuration_of_other_tensors_is_refused_by_the_tensors_name(
    models: dict[str, Path], tmp_path: Path, model: TinyModel, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        planned(models, model, changes, tmp_path)
    assert words in caught.value.message


def test_words_of_which_keys_follow_are_read_as_transformers_does(models: dict[str, Path], tmp_path: Path) -> None:
    gated = tiny_model(tmp_path / "gated", T5, feed_forward_proj="gated-silu")
    config = {"is_gated_act": None, "dense_act_fn": None}
    edit_json(gated / "config.json", **config)
    plan_merge([inspect_checkpoint(gated, "local:m")])
    with pytest.raises(InvalidCheckpoint, match="DenseReluDense"):
        planned(models, T5, {**config, "feed_forward_proj": "gated-silu"}, tmp_path)


def test_cross_attention_is_taken_of_a_decoder_alone(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", MASKED_BERT, is_decoder=True, add_cross_attention=True)
    plan_merge([inspect_checkpoint(folder, "local:m")])
    edit_json(folder / "config.json", is_decoder=False)
    with pytest.raises(InvalidCheckpoint, match="add_cross_attention"):
        plan_merge([inspect_checkpoint(folder, "local:m")])


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
        (LLAMA, {"problem_type": "other"}),
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
    plan = planned(models, model, changes, tmp_path)
    config = plan.checkpoints[0].config
    assert {key: config.get(key) for key in changes} == changes
