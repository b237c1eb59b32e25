"""The table of transformers' own kinds of model agrees with the transformers that is installed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import transformers

from tests.conftest import REPOSITORY
from tests.tiny import edit_json
from tests.tiny_language_models import LLAMA, tiny_model
from worker.engine.catalog.checkpoints.architectures import PIPELINE_TAGS, use_of
from worker.engine.catalog.checkpoints.config_differences import differences
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.library import (
    FLOAT,
    TABLE,
    TOKENIZERS,
    architecture,
    completed,
    decoded,
    encoded,
    member,
    model_type_of,
)
from worker.engine.checkpoints.library_table import as_json, described
from worker.engine.checkpoints.library_variations import plain

KINDS = (
    "llama", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma3_text", "phi", "bert", "modernbert", "t5", "bart", "marian",
    "mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "qwen2_vl",
)  # fmt: skip


def test_the_table_is_of_the_installed_version() -> None:
    with ZipFile(TABLE) as table:
        assert table.comment == f"transformers {transformers.__version__}".encode()


def test_the_table_has_every_kind_of_model_that_has_a_configuration_of_its_own() -> None:
    missing = [name for name in transformers.CONFIG_MAPPING if model_type_of(name) is None and has_defaults(name)]
    assert missing == []


def has_defaults(model_type: str) -> bool:
    try:
        transformers.CONFIG_MAPPING[model_type]()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("model_type", ["gpt_neox", "mamba2", "opt"])
def test_the_table_is_what_the_library_says_today(model_type: str) -> None:
    with ZipFile(TABLE) as table:
        stored = table.read(member(model_type)).decode()
    entry = described(model_type)
    assert entry is not None
    assert stored == as_json(entry)


def test_the_lists_are_what_the_library_says_today() -> None:
    """It is asked in a process of its own, since what other tests load may change what its classes say."""
    asked = "from worker.engine.checkpoints import library_table as t; print(t.as_json(t.lists_of_library()))"
    printed = subprocess.run([sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    today = json.loads(printed.stdout)
    with ZipFile(TABLE) as table:
        assert {name: json.loads(table.read(name)) for name in today} == today
    assert TOKENIZERS in today


@pytest.mark.parametrize(
    ("name", "auto_class", "tag", "has_labels"),
    [
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", False),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "text2text-generation", False),
        ("LlavaForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text", False),
        ("LlamaForCausalLM", "AutoModelForCausalLM", "text-generation", False),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation", False),
        ("GitForCausalLM", "AutoModelForCausalLM", "text-generation", False),
        ("MarianMTModel", "AutoModelForSeq2SeqLM", "text2text-generation", False),
        ("BertModel", "AutoModel", None, False),
        ("CLIPModel", "AutoModelForZeroShotImageClassification", "zero-shot-image-classification", False),
        ("Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification", "audio-classification", True),
        ("DeiTForImageClassificationWithTeacher", "AutoModelForImageClassification", "image-classification", True),
        ("SegformerForSemanticSegmentation", "AutoModelForSemanticSegmentation", "image-segmentation", True),
        ("BeitBackbone", "BeitBackbone", None, False),
        ("OwnForTokenClassification", "AutoModelForTokenClassification", "token-classification", True),
        ("OwnLMHeadModel", "AutoModelForCausalLM", "text-generation", False),
        ("Own", "AutoModel", None, False),
    ],
)
def test_the_use_of_a_class_is_how_the_library_loads_it(
    name: str, auto_class: str, tag: str | None, has_labels: bool
) -> None:
    use = use_of({"architectures": [name]})
    assert use == (auto_class, tag)
    assert use.has_labels is has_labels


def test_the_hubs_names_of_tasks_are_those_of_the_librarys_pipelines() -> None:
    by_class: dict[str, set[str]] = {}
    for task, implementation in transformers.pipelines.SUPPORTED_TASKS.items():
        for one in implementation["pt"]:
            by_class.setdefault(one.__name__, set()).add(task)
    told = by_class.keys() - {
        "AutoModel",
        "AutoModelForDecision",
    }  # which have several uses, or none that the hub knows
    assert [name for name in sorted(told) if PIPELINE_TAGS[name] not in by_class[name]] == []


@pytest.mark.parametrize(
    ("model_type", "name", "embedding", "output"),
    [
        ("llama", "LlamaForCausalLM", "model.embed_tokens.weight", "lm_head.weight"),
        ("xlnet", "XLNetLMHeadModel", "transformer.word_embedding.weight", "lm_loss.weight"),
        ("bert", "BertForSequenceClassification", "bert.embeddings.word_embeddings.weight", None),
        ("wav2vec2", "Wav2Vec2ForCTC", None, None),
    ],
)
def test_matrices_of_tokens_are_those_that_the_class_says(
    model_type: str, name: str, embedding: str | None, output: str | None
) -> None:
    known = architecture({"model_type": model_type}, name)
    assert known is not None
    assert (known.embedding, known.output) == (embedding, output)


def test_buffers_that_checkpoints_no_longer_have_are_told() -> None:
    known = architecture({"model_type": "llama"}, "LlamaForCausalLM")
    assert known is not None
    assert "model.rotary_emb.inv_freq" in known.computed
    norm = architecture({"model_type": "mobilenet_v2"}, "MobileNetV2ForImageClassification")
    assert norm is not None
    assert not [name for name in norm.computed if "running" in name]  # which are learned, and saved


def test_a_kind_that_there_is_not_is_unknown() -> None:
    assert model_type_of("../llama") is None
    assert model_type_of("own") is None
    assert model_type_of("") is None


@pytest.mark.parametrize("model_type", KINDS)
def test_a_missing_key_means_the_librarys_default(model_type: str) -> None:
    whole = plain(transformers.CONFIG_MAPPING[model_type]())
    kind = model_type_of(model_type)
    assert kind is not None
    for dropped in halves(sorted(whole.keys() - {"model_type"})):
        short = {key: value for key, value in whole.items() if key not in dropped}
        found = list(differences(completed(decoded(whole)), completed(decoded(short))))
        assert found == []


def halves(keys: list[str]) -> Iterator[set[str]]:
    yield from ({key for place, key in enumerate(keys) if place >> bit & 1} for bit in range(len(keys).bit_length()))


@pytest.mark.parametrize(
    ("model_type", "ours", "theirs", "keys"),
    [
        ("llama", {}, {"rope_theta": 10000.0}, []),
        ("llama", {}, {"rope_theta": 5e5}, ["rope_parameters.rope_theta"]),
        ("llama", {"rms_norm_eps": 1e-5}, {}, ["rms_norm_eps"]),
        ("llama", {"num_key_value_heads": 32, "num_attention_heads": 32}, {"num_attention_heads": 32}, []),
        ("llama", {"num_key_value_heads": 8}, {}, ["num_key_value_heads"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, []),
        ("gpt2", {"n_head": 4}, {"num_attention_heads": 4}, []),
        ("gpt2", {"n_head": 4}, {"num_attention_heads": 8}, ["n_head"]),
        ("gpt2", {"activation_function": "relu"}, {}, ["activation_function"]),
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}, {}, []),
        ("gpt_neox", {"rotary_pct": 1.0}, {}, ["rope_parameters.partial_rotary_factor"]),
        ("gemma3_text", {"rope_local_base_freq": 10000, "rope_theta": 1000000}, {}, []),
        ("gemma3_text", {"rope_local_base_freq": 20000}, {}, ["rope_parameters.sliding_attention.rope_theta"]),
        ("qwen2", {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}, {"num_hidden_layers": 3}, []),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "num_hidden_layers": 3}, {"num_hidden_layers": 3},
         ["layer_types"]),
        ("mamba2", {"time_step_limit": [0.0, float("inf")]}, {}, []),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, {}, ["time_step_limit"]),
    ],
)  # fmt: skip
def test_configurations_are_compared_by_what_they_mean(
    model_type: str, ours: dict[str, Any], theirs: dict[str, Any], keys: list[str]
) -> None:
    kind = {"model_type": model_type}
    found = differences(completed({**kind, **ours}), completed({**kind, **theirs}))
    assert [key for key, *_ in found] == keys


def test_floats_without_a_number_in_json_are_read_and_written_as_the_library_does(tmp_path: Path) -> None:
    values = {"limit": [0.0, float("inf")], "least": {"of": float("-inf")}, "plain": 1.5, "text": "Infinity", "n": None}
    written = encoded(values)
    assert written["limit"] == [0.0, {FLOAT: "Infinity"}]
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert decoded(written) == values
    assert str(decoded(encoded({"x": float("nan")}))["x"]) == "nan"
    assert decoded({FLOAT: "other"}) == {FLOAT: "other"}
    folder = tiny_model(tmp_path / "m", LLAMA)
    edit_json(folder / "config.json", own={FLOAT: "Infinity"})
    assert inspect_checkpoint(folder, "local:m").config["own"] == float("inf")


def test_a_part_of_a_model_may_be_of_any_kind() -> None:
    for name in transformers.CONFIG_MAPPING:
        kind = model_type_of(name)
        for refused in (kind.refused, *(one.refused for one in kind.architectures.values())) if kind else ():
            assert not [key for key in refused.words if key.rpartition(".")[2] == "model_type"], name
