"""Layouts that are known without building a model: transformers' own, and none where anything is unusual."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_checkpoint
from worker.engine.catalog.checkpoints.headers import inspect_checkpoint
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.known_layouts import MODELS, known_layout
from worker.engine.checkpoints.layout import built_layout

ENCODER: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "hidden_act": "gelu",
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 30,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 20,
    "max_position_embeddings": 16,
    "activation": "gelu",
}
DECODER: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
SETTINGS = {
    "BertForSequenceClassification": ENCODER,
    "RobertaForSequenceClassification": ENCODER,
    "XLMRobertaForSequenceClassification": ENCODER,
    "CamembertForSequenceClassification": ENCODER,
    "DistilBertForSequenceClassification": DISTILBERT,
    "LlamaForCausalLM": DECODER,
    "MistralForCausalLM": DECODER,
    "Qwen2ForCausalLM": DECODER,
    "Qwen3ForCausalLM": {**DECODER, "head_dim": 6},
}
LABELS = {"id2label": {str(number): f"l{number}" for number in range(11)}, "problem_type": "multi_label_classification"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FURTHER: dict[str, list[dict[str, Any]]] = {
    "encoder": [LABELS, {"type_vocab_size": 1, "classifier_dropout": 0.1, "dtype": "float16"}],
    "decoder": [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "rope_theta": 1e6, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": [1, 2]},
    ],
}


def configurations() -> list[Any]:
    found = []
    for architecture, sizes in SETTINGS.items():
        kind = "decoder" if "CausalLM" in architecture else "encoder"
        further = [*FURTHER[kind], *([{"head_dim": 6}] if architecture.startswith(("Llama", "Mistral")) else [])]
        for number, more in enumerate([{}, *further]):
            if architecture.startswith("Distil") and "type_vocab_size" in more:
                more = {"dropout": 0.2, "sinusoidal_pos_embds": False}
            config = {
                "architectures": [architecture],
                "model_type": MODELS[architecture].model_type,
                **sizes,
                **more,
            }
            found.append(pytest.param(config, id=f"{architecture}-{number}"))
    return found


@pytest.mark.parametrize("config", configurations())
def test_a_known_layout_is_that_of_the_model_that_transformers_builds(config: dict[str, Any]) -> None:
    known, built = known_layout(config, 1000), built_layout(config, "local:model", 1000)
    assert known is not None
    assert known == built


def test_every_known_model_is_compared() -> None:
    assert SETTINGS.keys() == MODELS.keys()


UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("BertForSequenceClassification", {"hidden_size": 13}),  # not a multiple of the heads
    ("BertForSequenceClassification", {"hidden_size": True}),
    ("BertForSequenceClassification", {"hidden_size": "12"}),
    ("BertForSequenceClassification", {"hidden_act": "no such function"}),
    ("BertForSequenceClassification", {"num_hidden_layers": 10**9}),
    ("BertForSequenceClassification", {"pad_token_id": 30}),
    ("BertForSequenceClassification", {"pad_token_id": -1}),
    ("BertForSequenceClassification", {"is_decoder": True}),
    ("BertForSequenceClassification", {"problem_type": "other"}),
    ("BertForSequenceClassification", {"id2label": {"1": "a"}}),
    ("BertForSequenceClassification", {"layer_norm_eps": "small"}),
    ("BertForSequenceClassification", {"never_heard_of": 1}),
    ("BertForSequenceClassification", {"model_type": "roberta"}),
    ("BertForSequenceClassification", {"architectures": ["BertForSequenceClassification", "BertModel"]}),
    ("BertModel", {}),
    ("RobertaForSequenceClassification", {"pad_token_id": 16}),  # which is no position
    ("DistilBertForSequenceClassification", {"n_heads": 5}),
    ("LlamaForCausalLM", {"num_key_value_heads": 3}),
    ("LlamaForCausalLM", {"attention_bias": True}),
    ("LlamaForCausalLM", {"mlp_bias": True}),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": ["llama3"]}}),
    ("LlamaForCausalLM", {"rope_scaling": [1]}),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True}),
]


@pytest.mark.parametrize(("architecture", "changes"), UNUSUAL)
def test_nothing_unusual_is_known(architecture: str, changes: dict[str, Any]) -> None:
    known = SETTINGS.get(architecture, ENCODER)
    model_type = MODELS[architecture].model_type if architecture in MODELS else "bert"
    config = {"architectures": [architecture], "model_type": model_type, **known, **changes}
    assert known_layout(config, 1000) is None


def test_a_missing_size_is_not_guessed() -> None:
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **DECODER}
    for key in ("num_key_value_heads", "hidden_size", "vocab_size"):
        assert known_layout({name: value for name, value in config.items() if name != key}, 1000) is None


def test_what_save_pretrained_writes_is_known(tmp_path: Path) -> None:
    info = inspect_checkpoint(tiny_checkpoint(tmp_path / "model"), "local:model")
    assert known_layout(info.config, len(info.tensors)) is not None


def test_what_transformers_refuses_is_refused_in_its_words() -> None:
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", **ENCODER, "hidden_size": 13}
    with pytest.raises(InvalidCheckpoint, match=r"transformers cannot load it: .*13.*multiple"):
        built_layout(config, "local:model", 1000)
