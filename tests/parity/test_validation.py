"""What validation accepts the worker accepts, and what transformers loads whole is accepted by both.

Validation decides by the table of transformers' models, the worker by building the models. Both are asked of small
checkpoints whose configurations differ from a valid one in one key, or that lack one tensor.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, NEOX, QWEN2, T5, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.identity import identify
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.library import collapsed, model_type_of
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import EngineError
from worker.engine.checkpoints.reloading import Reloading

BART = TinyModel(
    "BartForConditionalGeneration",
    "bart",
    {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    },
)  # fmt: skip
STARCODER = TinyModel("Starcoder2ForCausalLM", "starcoder2", LLAMA.settings)
WAV2VEC = TinyModel(
    "Wav2Vec2ForSequenceClassification",
    "wav2vec2",
    {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "conv_dim": [8, 8], "conv_stride": [2, 2],
        "conv_kernel": [3, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    },
)  # fmt: skip
MODELS = {model.model_type: model for model in (LLAMA, QWEN2, STARCODER, GPT2, NEOX, T5, MASKED_BERT, BART, WAV2VEC)}
ROTARY = (
    {"rope_type": "none"}, {"rope_type": 1}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": "2"}, {"rope_type": "default", "rope_theta": "x"},
)  # fmt: skip
UNTOLD = (
    "architectures", "model_type", "id2label", "label2id", "transformers_version", "dtype",
    "add_adapter",  # one class of Wav2Vec2 refuses it, and the table has what the kind refuses
)  # fmt: skip
FURTHER: list[dict[str, Any]] = [
    {"per_layer_config": 1}, {"per_layer_config": {"0": {"x": 1}}}, {"per_layer_config": {}}, {"sub_configs": {}},
    {"layer_types": ["x", "x"]}, {"layer_types": ["full_attention"]}, {"rope_scaling": {"type": "yarn"}},
    {"add_cross_attention": True, "is_decoder": True}, {"num_labels": 3},
]  # fmt: skip


def others(value: object) -> list[Any]:
    """Other values of a key, ordinary ones and impossible ones."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [-1, 0, 3, value * 2]
    if isinstance(value, float):
        return [-0.5, 0.5, 1.5]
    if isinstance(value, str):
        return ["x", "gelu", "gated-silu", "gated-x"]
    if isinstance(value, list):
        return [value[:-1], [*value, *value[-1:]]]
    return [True, 3, "x"]


def changes(info: CheckpointInfo) -> Iterator[dict[str, Any]]:
    kind = model_type_of(info.model_type)
    assert kind is not None
    for key, value in {**kind.defaults, **info.config}.items():
        if key == "rope_parameters":
            yield from ({key: {"rope_theta": 10_000.0, **one}} for one in ROTARY)
        elif key not in UNTOLD:
            yield from ({key: other} for other in others(value))
    yield from FURTHER


def refused_by_validation(info: CheckpointInfo) -> bool:
    try:
        plan_merge([info])
    except EngineError:
        return True
    return False


def refused_by_the_worker(info: CheckpointInfo) -> str:
    try:
        Reloading(plan_merge([info])).check_descriptions()
    except EngineError as error:
        return error.message
    return ""


@cache
def folder_of(model_type: str, root: Path) -> Path:
    return tiny_model(root / model_type, MODELS[model_type])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("model_type", MODELS)
def test_no_configuration_that_validation_accepts_is_refused_by_the_worker(root: Path, model_type: str) -> None:
    info = inspect_checkpoint(folder_of(model_type, root), "local:m")
    assert not refused_by_validation(info)
    refused, disagreed = 0, {}
    for change in changes(info):
        varied = replace(info, config={**info.config, **change})
        if refused_by_validation(varied):
            refused += 1
        elif problem := refused_by_the_worker(varied):
            disagreed[json.dumps(change)] = problem
    assert refused > 20
    assert disagreed == {}


@pytest.mark.parametrize("model_type", MODELS)
def test_no_checkpoint_without_a_tensor_that_validation_accepts_is_refused_by_the_worker(
    root: Path, model_type: str
) -> None:
    info = inspect_checkpoint(folder_of(model_type, root), "local:m")
    disagreed, uncertain = [], identify(info).uncertain or frozenset()
    for name in info.tensors:
        lacking = replace(info, tensors={other: one for other, one in info.tensors.items() if other != name})
        is_told = collapsed(name) not in uncertain
        if is_told and not refused_by_validation(lacking) and refused_by_the_worker(lacking):
            disagreed.append(name)
    assert disagreed == []
