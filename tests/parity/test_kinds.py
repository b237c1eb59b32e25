"""Two models of many kinds: what planning takes the engine merges, and transformers loads the result as it is."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.tiny import edit_json, edit_tensors, merge_spec, model_spec, silent, tiny_checkpoint
from tests.tiny_language_models import LLAMA, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, OutputSpec
from worker.engine.catalog.methods import TaskArithmeticParameters
from worker.engine.catalog.planning.planner import plan_job, plan_merge
from worker.engine.jobs.engine import Engine

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
INFINITE = float("inf")
SEQUENCES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0,
    "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2, "vocab_size": 64, "pad_token_id": 0}
NAMED_LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
"""Names without which nothing says that two heads are of one task."""
KINDS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "XLM-R": ("XLMRobertaForMaskedLM", "xlm-roberta", {**SMALL, "max_position_embeddings": 40}),
    "CamemBERT": ("CamembertForMaskedLM", "camembert", {**SMALL, "max_position_embeddings": 40}),
    "Marian": ("MarianMTModel", "marian", SEQUENCES),
    "BART": ("BartForConditionalGeneration", "bart", SEQUENCES),
    "T5": ("T5ForConditionalGeneration", "t5", T5),
    "T5 1.1": ("T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "Mamba 2": (
        "Mamba2ForCausalLM", "mamba2",
        {**SMALL, "num_heads": 8, "head_dim": 4, "state_size": 8, "n_groups": 1, "time_step_limit": (0.0, INFINITE)},
    ),
    "Bamba": ("BambaForCausalLM", "bamba", {**SMALL, **MAMBA, "attn_layer_indices": [1]}),
    "Falcon-H1": ("FalconH1ForCausalLM", "falcon_h1", {**SMALL, **MAMBA, "mamba_d_ssm": 32, "head_dim": 4}),
    "Nemotron-H": (
        "NemotronHForCausalLM", "nemotron_h",
        {**SMALL, "mamba_num_heads": 8, "mamba_head_dim": 4, "ssm_state_size": 8, "n_groups": 1, "head_dim": 4,
         "hybrid_override_pattern": "M*-M", "num_hidden_layers": 4},
    ),
    "GraniteMoeHybrid": (
        "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        {**SMALL, **MAMBA, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 24,
         "layer_types": ["mamba", "attention"]},
    ),
    "Gemma 3": ("Gemma3ForCausalLM", "gemma3_text", {**SMALL, "head_dim": 4}),
    "Mixtral": ("MixtralForCausalLM", "mixtral", {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "OPT": ("OPTForCausalLM", "opt", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "ViT": ("ViTForImageClassification", "vit", {**SMALL, "image_size": 16, "patch_size": 8, **NAMED_LABELS}),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(torch.device("cpu"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def saved(folder: Path, architecture: str, model_type: str, settings: Mapping[str, Any], seed: int) -> Path:
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = getattr(transformers, architecture)(config)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=drawn))
    model.save_pretrained(folder)
    return folder


def state_of(folder: Path, architecture: str) -> dict[str, Tensor]:
    """Of the model that transformers loads; nothing may be missing or left over."""
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not {kind: names for kind, names in report.items() if names}
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_a_kind_are_planned_and_merged_to_their_average(engine: Engine, tmp_path: Path, kind: str) -> None:
    architecture, model_type, settings = KINDS[kind]
    folders = [saved(tmp_path / name, architecture, model_type, settings, seed) for seed, name in enumerate("ab")]
    if kind == "T5 1.1":
        for folder in folders:
            edit_json(folder / "config.json", tie_word_embeddings=False)
    assert plan_merge([inspect_checkpoint(folder, "local:x") for folder in folders]).notes == ()
    specs = [model_spec(folder) for folder in folders]
    engine.merge(merge_spec(tmp_path / "out", specs, {"name": "linear"}, heads="merged"), silent)
    ours, *theirs = (state_of(f, architecture) for f in (tmp_path / "out" / "model", *folders))
    for name, value in ours.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([state[name] for state in theirs]).mean(0), rtol=0, atol=1e-6)
    for folder in (tmp_path / "out" / "model", folders[0]):
        json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)


def test_matrices_padded_to_different_numbers_of_rows_are_merged_where_there_are_tokens(
    engine: Engine, tmp_path: Path
) -> None:
    folders = [tiny_model(tmp_path / f"m{rows}", seed=rows, vocab_size=rows) for rows in (112, 128)]
    spec = merge_spec(tmp_path / "out", [model_spec(folder) for folder in folders], {"name": "linear"})
    result = engine.merge(spec, silent)
    tokens = 98  # of the tokenizer
    merged, short, long = (state_of(f, "LlamaForCausalLM") for f in (tmp_path / "out" / "model", *folders))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert merged[name].shape == short[name].shape
        mean = (short[name][:tokens] + long[name][:tokens]) / 2
        torch.testing.assert_close(merged[name][:tokens], mean, rtol=0, atol=1e-6)
        assert torch.equal(merged[name][tokens:], short[name][tokens:])
    assert "112 in local:m112, 128 in local:m128" in result.notes[0]


def test_what_a_base_lacks_of_a_head_is_averaged_and_the_rest_merged_with_it(engine: Engine, tmp_path: Path) -> None:
    classifier = TinyModel("StableLmForSequenceClassification", "stablelm", {**LLAMA.settings, "pad_token_id": 2})
    models = [tiny_model(tmp_path / f"m{seed}", classifier, seed=seed) for seed in (1, 2)]
    pre_trained = TinyModel("StableLmForCausalLM", "stablelm", LLAMA.settings)
    base = tiny_model(tmp_path / "base", pre_trained)
    method = {"name": "task_arithmetic", "scale": 0.5}
    spec = merge_spec(
        tmp_path / "out", [model_spec(f, weight=w) for f, w in zip(models, (1.0, 3.0), strict=True)], method
    )
    result = engine.merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
    merged, first, second = (state_of(f, classifier.architecture) for f in (tmp_path / "out" / "model", *models))
    ancestor = state_of(base, pre_trained.architecture)
    for name, value in merged.items():
        if name == "score.weight":
            expected = (first[name] + 3 * second[name]) / 4
        else:
            expected = ancestor[name] + 0.5 * (first[name] - ancestor[name] + 3 * (second[name] - ancestor[name]))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    assert ["score.weight to compare with" in note for note in result.notes].count(True) == 1


def test_experts_keep_the_poolers_that_their_base_lacks(engine: Engine, tmp_path: Path) -> None:
    models = [tiny_checkpoint(tmp_path / f"m{seed}", seed=seed) for seed in (1, 2)]
    base = tiny_checkpoint(tmp_path / "base", seed=0)
    edit_tensors(base, lambda ts: {n: t for n, t in ts.items() if not n.startswith(("classifier", "bert.pooler"))})
    edit_json(base / "config.json", architectures=["BertForMaskedLM"], pad_token_id=3)
    spec = merge_spec(tmp_path / "out", [model_spec(folder) for folder in models], {"name": "task_arithmetic"})
    result = engine.merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
    for folder in models:
        merged = state_of(tmp_path / "out" / "models" / folder.name, "BertForSequenceClassification")
        own = state_of(folder, "BertForSequenceClassification")
        same = {name for name in own if torch.equal(own[name], merged[name])}
        assert {name for name in own if name.startswith(("classifier", "bert.pooler"))} <= same
        assert not any(".layer." in name for name in same)
    assert "local:base has no tensor bert.pooler.dense.bias (like 1 more)" in result.notes[0]


@pytest.mark.parametrize("whose", ["b", "base"])
def test_all_of_the_configuration_that_counts_is_published_and_loaded(
    engine: Engine, tmp_path: Path, whose: str
) -> None:
    settings: dict[str, dict[str, Any]] = {
        "a": {"eos_token_id": 1, "max_position_embeddings": 64},
        "b": {"eos_token_id": [1, 6], "bos_token_id": 3, "pad_token_id": 2, "max_position_embeddings": 128},
        "base": {"eos_token_id": 5, "bos_token_id": 4, "pad_token_id": 7, "max_position_embeddings": 96},
    }
    for seed, (name, said) in enumerate(settings.items()):
        folder = tiny_model(tmp_path / name, LLAMA, seed=(seed + 1) % 3)
        edit_json(
            folder / "config.json", **said, architectures=["LlamaModel" if name == "base" else "LlamaForCausalLM"]
        )
        edit_json(folder / "generation_config.json", eos_token_id=said["eos_token_id"], max_length=seed + 10)
        (folder / "chat_template.jinja").write_text(f"{{{{ '{name}' }}}}")
    models = [model_spec(tmp_path / name) for name in "ab"]
    spec = merge_spec(tmp_path / "out", models, {"name": "task_arithmetic"}, config_from=whose)
    base = CheckpointSpec(source="local:base", path=tmp_path / "base")
    result = engine.merge(spec.model_copy(update={"base": base}), silent)
    published = tmp_path / "out" / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(published)
    assert {key: getattr(loaded.config, key) for key in settings[whose]} == settings[whose]
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.generation_config.eos_token_id == settings[whose]["eos_token_id"]
    assert loaded.generation_config.max_length == [*settings].index(whose) + 10
    assert transformers.AutoTokenizer.from_pretrained(published).chat_template == f"{{{{ '{whose}' }}}}"
    assert any(note.startswith("eos_token_id differs: 1 in local:a, [1, 6] in local:b") for note in result.notes)


def test_classifiers_keep_their_labels_where_the_bases_configuration_counts(engine: Engine, tmp_path: Path) -> None:
    models = [tiny_checkpoint(tmp_path / f"m{seed}", seed=seed) for seed in (1, 2)]
    for number, folder in enumerate(models):
        edit_json(
            folder / "config.json", id2label={"0": f"no{number}", "1": "yes"}, label2id={f"no{number}": 0, "yes": 1}
        )
    base = tiny_checkpoint(tmp_path / "base", seed=0)
    edit_json(base / "config.json", architectures=["BertForMaskedLM"], id2label=None, layer_norm_eps=1e-5)
    spec = merge_spec(tmp_path / "out", [model_spec(folder) for folder in models], {"name": "task_arithmetic"})
    spec = spec.model_copy(update={"output": spec.output.model_copy(update={"config_from": "base"})})
    engine.merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
    for number, folder in enumerate(models):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "models" / folder.name)
        assert config.architectures == ["BertForSequenceClassification"]
        assert config.id2label == {0: f"no{number}", 1: "yes"}
        assert config.layer_norm_eps == 1e-5


def test_padding_from_which_positions_count_stays_the_models(tmp_path: Path) -> None:
    kind, settings = "roberta", {**SMALL, "pad_token_id": 1, "max_position_embeddings": 40}
    folders = [tmp_path / name for name in ("a", "b", "base")]
    for folder in folders:
        config = transformers.AutoConfig.for_model(kind, **settings)
        transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    edit_json(folders[-1] / "config.json", pad_token_id=0, eos_token_id=5)
    a, b, base = (inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders)
    names = ["a", "b"]
    plan = plan_job(TaskArithmeticParameters(), names, [a, b], OutputSpec(heads="merged", config_from="base"), base)
    assert (plan.published[0].config["pad_token_id"], plan.published[0].config["eos_token_id"]) == (1, 5)
    assert "pad_token_id differs: 1 in local:a, 1 in local:b, 0 in local:base; published is 1" in plan.notes


def test_the_settings_that_count_are_published_and_loaded(engine: Engine, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    folders = [tiny_model(tmp_path / "a", LLAMA, seed=1), tiny_model(tmp_path / "b", LLAMA, seed=2)]
    edit_json(
        folders[1] / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}
    )
    spec = merge_spec(tmp_path / "out", [model_spec(f) for f in folders], {"name": "linear"}, config_from="b")
    result = engine.merge(spec, silent)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "model")
    assert {key: loaded.rope_parameters[key] for key in scaling} == scaling
    assert [note for note in result.notes if "that of local:b counts, whose configuration is published" in note]
