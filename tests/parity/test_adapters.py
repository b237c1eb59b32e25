"""Adapters against the formula in float64, against PEFT's own merge, and merged as whole checkpoints are."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import (
    Tensors,
    edit_json,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_base,
    tiny_checkpoint,
    tiny_texts,
    write_rows,
)
from tests.tiny_adapters import edit_adapter, merged_by_peft, save_adapter, tiny_adapter
from tests.tiny_families import TINY_BERT, TINY_FAMILIES
from tests.tiny_language_models import (
    GPT2,
    LLAMA,
    MASKED_BERT,
    QWEN2,
    TinyModel,
    loaded_model,
    tiny_model,
    word_level_tokenizer,
)
from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, MergeSpec
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.checkpoints.reader import Digests, TensorReader
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import load

CPU = torch.device("cpu")
QUERY = "bert.encoder.layer.1.attention.self.query"
ROUNDING = 1e-6
LORA: dict[str, dict[str, Any]] = {
    "query and value": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas of their own": {
        "rank_pattern": {"layer.0.attention.self.query": 2, "value": 3},
        "alpha_pattern": {r"^bert\.encoder\.layer\.1\.attention.*": 5, "query": 1.5},
    },
    "every linear layer and its bias": {"target_modules": "all-linear", "bias": "all"},
    "biases of what is adapted": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["word_embeddings", "query", "dense"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model without head or prefix."""
    return tiny_base(tmp_path_factory.mktemp("adapted") / "base")


def adapted(adapter: Path, base: Path) -> CheckpointInfo:
    return inspect_model(adapter, f"local:{adapter.name}", inspect_checkpoint(base, "local:base"))


def read(info: CheckpointInfo) -> Tensors:
    with TensorReader() as reader:
        return {name: reader.read(tensor) for name, tensor in info.tensors.items()}


def whole(base: Path, adapter: Path, labels: int, dtype: torch.dtype = torch.float32) -> Any:
    """As PEFT merges it."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    return merged_by_peft(model, adapter)


@pytest.mark.parametrize("kind", LORA)
def test_every_tensor_is_what_peft_makes_of_it(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = tiny_adapter(tmp_path / "a", base, labels=3, seed=1, **LORA[kind])
    info = adapted(adapter, base)
    expected = dict(whole(base, adapter, 3).named_parameters())
    found = read(info)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=ROUNDING)
    assert sum(tensor.delta is not None for tensor in info.tensors.values()) >= 4
    assert (info.config["architectures"], len(info.config["id2label"])) == (["BertForSequenceClassification"], 3)


REGULAR = r"(?:.*?(?:encoder|text).*?(?:self|mlp).*?(?:query|value).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:q_proj))"
ACCEPTED: dict[str, dict[str, Any]] = {
    "transposed layers, which are not": {"fan_in_fan_out": True},
    "a pattern": {"target_modules": r"bert\.encoder\.layer\.\d+\.attention\.self\.(query|value)"},
    "a pattern of Unsloth": {"target_modules": REGULAR},
    "all linear layers": {"target_modules": "all-linear"},
    "longer ends of names": {"target_modules": ["self.query", "attention.self.value"]},
    "all layers": {"layers_to_transform": [0, 1]},
    "all layers of a list": {"layers_to_transform": [0, 1], "layers_pattern": "layer"},
    "all layers of lists": {"layers_to_transform": [0, 1], "layers_pattern": ["blocks", "encoder.layer"]},
    "no layers": {"layers_to_transform": []},
    "what is excluded elsewhere": {"exclude_modules": ["key", "pooler.dense"]},
    "a pattern that excludes nothing of it": {"exclude_modules": r".*\.key"},
    "a module stored whole that is there": {"modules_to_save": ["classifier"]},
    "biases of a setting that stores none": {"bias": "all"},
}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "fewer targets": {"target_modules": ["value"]},
    "a pattern that leaves out": {"target_modules": r".*layer\.0\..*(query|value)"},
    "a pattern for ends of names": {"target_modules": "query|value"},
    "excluded": {"exclude_modules": ["self.query"]},
    "excluded by a pattern": {"exclude_modules": r".*1\..*"},
    "one layer": {"layers_to_transform": 0},
    "another list of layers": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layer"]},
    "stored whole": {"modules_to_save": ["encoder.layer.0"]},
}


@pytest.fixture(scope="module")
def usual(base: Path) -> Path:
    """An adapter of `query` and `value`."""
    return tiny_adapter(base.parent / "usual", base, labels=3, seed=4)


@pytest.mark.parametrize("case", ACCEPTED)
def test_by_whatever_settings_the_tensors_count_they_count_as_in_peft(
    base: Path, usual: Path, tmp_path: Path, case: str
) -> None:
    adapter = Path(shutil.copytree(usual, tmp_path / "a"))
    edit_json(adapter / "adapter_config.json", **ACCEPTED[case])
    expected = dict(whole(base, adapter, 3).named_parameters())
    found = read(adapted(adapter, base))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_peft_leaves_out_without_a_word_is_refused(base: Path, usual: Path, tmp_path: Path, case: str) -> None:
    """PEFT raises an error if all is left out, or makes another model than of all tensors."""
    adapter = Path(shutil.copytree(usual, tmp_path / "a"))
    edit_json(adapter / "adapter_config.json", **LEFT_OUT[case])
    every = read(adapted(usual, base))
    try:
        made = dict(whole(base, adapter, 3).named_parameters())
    except (ValueError, KeyError):
        made = {}
    assert any(not torch.allclose(tensor, every[name]) for name, tensor in made.items()) or not made
    with pytest.raises(InvalidCheckpoint, match=r"tensor base_model\.model\.\S+lora_A\.weight would not count in PEFT"):
        adapted(adapter, base)


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_is_added_follows_the_formula(base: Path, tmp_path: Path, stabilised: bool) -> None:
    adapter = tiny_adapter(
        tmp_path / "a", base, seed=2, use_rslora=stabilised, target_modules=["query", "word_embeddings"]
    )
    stored = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    origin = {name: tensor.double() for name, tensor in read_model(base).items()}
    scaling = 6 / math.sqrt(4) if stabilised else 6 / 4
    a, b = (stored[f"base_model.model.{QUERY}.lora_{which}.weight"] for which in "AB")
    query = origin["encoder.layer.1.attention.self.query.weight"] + scaling * b @ a
    a, b = (stored[f"base_model.model.bert.embeddings.word_embeddings.lora_embedding_{which}"] for which in "AB")
    words = origin["embeddings.word_embeddings.weight"] + scaling * (b @ a).T
    found = read(adapted(adapter, base))
    torch.testing.assert_close(found[f"{QUERY}.weight"].double(), query, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found["bert.embeddings.word_embeddings.weight"].double(), words, rtol=0, atol=ROUNDING)


def test_rows_are_the_same_alone_and_together(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", base, target_modules=["query", "word_embeddings"])
    info = adapted(adapter, base)
    with TensorReader() as reader:
        for name in (f"{QUERY}.weight", "bert.embeddings.word_embeddings.weight"):
            tensor = info.tensors[name]
            some = reader.read(tensor, slice(3, 7))
            torch.testing.assert_close(some, reader.read(tensor)[3:7], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_sum_is_not_rounded_to_the_base_s_format(tmp_path: Path, dtype: torch.dtype, wide: torch.dtype) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=dtype)
    adapter = tiny_adapter(tmp_path / "a", base)
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{QUERY}.lora_{which}.weight"].double() for which in "AB")
    expected = read_model(base)[f"{QUERY}.weight"].double() + 6 / 4 * b @ a
    info = adapted(adapter, base)
    found = read(info)[f"{QUERY}.weight"]
    assert (found.dtype, info.tensors[f"{QUERY}.weight"].dtype) == (
        wide,
        {"torch.bfloat16": "BF16"}.get(str(dtype), "F64"),
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("prefix", [True, False])
def test_layers_that_are_stored_transposed(tmp_path: Path, prefix: bool) -> None:
    """GPT-2's, of which one is square; published without the prefix, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    (model if prefix else model.transformer).save_pretrained(tmp_path / "base")
    save_adapter(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base"),
        tmp_path / "a",
        3,
        target_modules=["c_attn", "c_proj", "c_fc"],
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
    )
    edit_json(tmp_path / "a" / "adapter_config.json", fan_in_fan_out=False)  # as it is when lm_head was adapted last
    found = read(adapted(tmp_path / "a", tmp_path / "base"))
    expected = merged_by_peft(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "a").state_dict()
    adapted_names = [name for name in found if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    assert len(adapted_names) == 8
    for name in adapted_names:
        full = name if prefix else f"transformer.{name}"
        torch.testing.assert_close(found[name], expected[full], rtol=0, atol=ROUNDING)


ATTENTION = {"distilbert": ["q_lin", "v_lin"], "deberta-v3": ["query_proj", "value_proj"]}


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v3"])
def test_adapters_of_other_families(tmp_path: Path, family: str) -> None:
    tiny = TINY_FAMILIES[family]
    base = tiny_checkpoint(tmp_path / "base", family=tiny)
    adapter = tiny_adapter(tmp_path / "a", base, labels=3, family=tiny, target_modules=ATTENTION.get(family, ["query"]))
    expected = whole_of_checkpoint(base, adapter, 3)
    loaded = load(adapted(adapter, base), CPU)
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(loaded.model.get_parameter(name), tensor, rtol=0, atol=ROUNDING)


def whole_of_checkpoint(base: Path, adapter: Path, labels: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    return merged_by_peft(model, adapter)


def logits(model: Any) -> Tensor:
    inputs = TINY_BERT.tokenizer()(tiny_texts(5), padding=True, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def adapters_spec(
    folder: Path, base: Path, adapters: Mapping[Path, Path], method: dict[str, Any], **output: Any
) -> MergeSpec:
    """A merge of adapters, each measured on its rows."""
    models = [model_spec(adapter, rows) for adapter, rows in adapters.items()]
    spec = merge_spec(folder, models, method, **output)
    return spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})


@pytest.fixture(scope="module")
def pair(base: Path) -> dict[Path, Path]:
    """Two adapters with their rows, and beside them, as `whole-…`, the checkpoints that PEFT makes of them."""
    found = {}
    for seed, labels in enumerate((2, 3)):
        folder = tiny_adapter(base.parent / f"m{seed}", base, labels=labels, seed=seed, target_modules="all-linear")
        whole(base, folder, labels).save_pretrained(base.parent / f"whole-m{seed}" / f"m{seed}")
        TINY_BERT.tokenizer().save_pretrained(base.parent / f"whole-m{seed}" / f"m{seed}")
        found[folder] = write_rows(base.parent / f"m{seed}.jsonl", labels=labels, seed=seed)
    return found


def test_the_artifact_of_one_adapter_is_the_model_that_peft_merges(
    base: Path, pair: dict[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    [(adapter, rows), *_] = pair.items()
    Engine().merge(adapters_spec(tmp_path / "out", base, {adapter: rows}, {"name": "average"}), silent)
    folder = tmp_path / "out" / "models" / "m0"
    found = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(logits(found), logits(whole(base, adapter, 2)), rtol=0, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(TINY_BERT.tokenizer())
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize("name", ["average", "task_arithmetic"])
def test_merges_of_adapters_follow_the_formula(base: Path, pair: dict[Path, Path], tmp_path: Path, name: str) -> None:
    Engine().merge(adapters_spec(tmp_path / "out", base, pair, {"name": name}), silent)
    found = read_model(tmp_path / "out" / "models" / "m0")
    origin = {name: tensor.double() for name, tensor in read_model(base).items()}
    deltas = []
    for adapter in pair:
        stored = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        modules = {name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")}
        deltas.append(
            {
                module.removeprefix("base_model.model.bert."): 1.5
                * stored[f"{module}.lora_B.weight"]
                @ stored[f"{module}.lora_A.weight"]
                for module in modules
            }
        )
    for tensor_name, tensor in origin.items():
        module = tensor_name.removesuffix(".weight")
        total = sum((delta[module] for delta in deltas if module in delta), torch.zeros_like(tensor))
        expected = tensor + (total / 2 if name == "average" else 0.4 * total)
        torch.testing.assert_close(found[f"bert.{tensor_name}"].double(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("method", ["mask_fisher", "fisher", "regmean", "ties"])
def test_adapters_merge_as_the_checkpoints_do_that_peft_makes_of_them(
    base: Path, pair: dict[Path, Path], tmp_path: Path, method: str
) -> None:
    found, expected = tmp_path / "adapters", tmp_path / "whole"
    recipe = {"name": method}
    Engine().merge(adapters_spec(found, base, pair, recipe, align_heads=True), silent)
    checkpoints = {path.parent / f"whole-{path.name}" / path.name: rows for path, rows in pair.items()}
    Engine().merge(adapters_spec(expected, base, checkpoints, recipe, align_heads=True), silent)
    for model in ("m0", "m1"):
        ours, theirs = read_model(found / "models" / model), read_model(expected / "models" / model)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "modules"),
    [(LLAMA, ["q_proj", "down_proj"]), (QWEN2, ["k_proj", "up_proj"]), (GPT2, ["c_attn", "c_proj"])],
    ids=lambda value: value.model_type if isinstance(value, TinyModel) else "",
)
def test_adapters_of_language_models_merge_into_one(tmp_path: Path, model: TinyModel, modules: list[str]) -> None:
    base = tiny_model(tmp_path / "base", model)
    (base / "generation_config.json").write_text('{"top_k": 7}')
    (base / "processor_config.json").write_text('{"of": "base"}')
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        started = loaded_model(base, model.architecture, torch.float32)
        save_adapter(started, folder, seed, target_modules=modules, task_type="CAUSAL_LM")
    word_level_tokenizer().save_pretrained(folders[0])
    models = [model_spec(folder) for folder in folders]
    spec = merge_spec(tmp_path / "out", models, {"name": "average"}, heads="merged")
    Engine().merge(spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)}), silent)
    found = loaded_model(tmp_path / "out" / "model", model.architecture)
    a, b = (merged_by_peft(loaded_model(base, model.architecture), folder).state_dict() for folder in folders)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2, rtol=0, atol=ROUNDING)
    assert json.loads((tmp_path / "out" / "model" / "generation_config.json").read_text()) == {"top_k": 7}
    assert json.loads((tmp_path / "out" / "model" / "processor_config.json").read_text()) == {"of": "base"}
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()


TEXT = {"vocab_size": 64, "num_hidden_layers": 2, **LLAMA.settings}
PICTURES = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
RENAMED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **PICTURES},
        },
        {"target_modules": r"^model\.language_model\.layers\.\d+\.self_attn\.q_proj$", "modules_to_save": ["lm_head"]},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "patch_size": 8},
        },
        {"target_modules": ["q_proj", "qkv"], "bias": "lora_only", "rank_pattern": {r"model\.visual\..*\.qkv": 2}},
    ),
    "vit": (
        "ViTForImageClassification",
        PICTURES,
        {"target_modules": ["q_proj", "fc2"], "alpha_pattern": {"vit.layers.1.attention.q_proj": 3}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", RENAMED)
def test_names_that_transformers_changes_as_it_loads_are_found_in_the_files(tmp_path: Path, model_type: str) -> None:
    """Adapters have the names of the running model, and checkpoints those of its first version."""
    architecture, settings, lora = RENAMED[model_type]
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "a", 1, **lora)
    spec = merge_spec(tmp_path / "out", [model_spec(tmp_path / "a")], {"name": "linear"}, heads="merged")
    base = CheckpointSpec(source="local:base", path=tmp_path / "base")
    Engine(CPU).merge(spec.model_copy(update={"base": base}), silent)
    loaded = loaded_model(tmp_path / "base", architecture, torch.float32)
    merged_by_peft(loaded, tmp_path / "a").save_pretrained(tmp_path / "expected")
    found, expected = read_model(tmp_path / "out" / "model"), read_model(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert any(not torch.equal(tensor, read_model(tmp_path / "base")[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=ROUNDING)


def test_evaluation_compares_with_the_adapted_model(base: Path, pair: dict[Path, Path], tmp_path: Path) -> None:
    spec = adapters_spec(tmp_path / "out", base, pair, {"name": "average"})
    rows = {adapter.name: rows for adapter, rows in pair.items()}
    models = []
    for model in spec.models:
        evaluation = {"source": "rows", "path": rows[model.name], "label": "label", "metric": "accuracy"}
        models.append(type(model).model_validate({**model.model_dump(), "evaluation": evaluation}))
    result = Engine().merge(spec.model_copy(update={"models": models, "evaluate": True}), silent)
    assert result.metrics is not None
    for adapter, labels in zip(pair, (2, 3), strict=True):
        lines = [json.loads(line) for line in rows[adapter.name].read_text().splitlines()]
        inputs = TINY_BERT.tokenizer()([line["text"] for line in lines], padding=True, return_tensors="pt")
        with torch.no_grad():
            predicted = whole(base, adapter, labels)(**inputs).logits.argmax(-1)
        right = [int(p) == line["label"] for p, line in zip(predicted, lines, strict=True)]
        assert result.metrics[adapter.name].expert == pytest.approx(sum(right) / len(right))


def test_the_digest_is_of_adapter_and_base(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    adapter = tiny_adapter(tmp_path / "a", base)
    before = Digests().of_checkpoint(adapted(adapter, base))
    assert before == Digests().of_checkpoint(adapted(adapter, base))
    assert before != Digests().of_checkpoint(adapted(adapter, other))
    edit_adapter(adapter, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    assert before != Digests().of_checkpoint(adapted(adapter, base))


def test_a_head_that_peft_added_to_a_decoder_is_merged_over_a_language_model(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", GPT2)
    edit_json(base / "config.json", pad_token_id=2)
    folders = []
    for seed in (1, 2):
        whole = transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=3)
        save_adapter(whole, tmp_path / f"a{seed}", seed, task_type="SEQ_CLS", target_modules=["c_attn"])
        folders.append(tmp_path / f"a{seed}")
    spec = merge_spec(tmp_path / "out", [model_spec(folder) for folder in folders], {"name": "linear"}, heads="merged")
    spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    Engine(CPU).merge(spec, silent)
    merged = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    by_peft = [
        merged_by_peft(transformers.GPT2ForSequenceClassification.from_pretrained(base, num_labels=3), folder)
        for folder in folders
    ]
    assert merged.num_labels == 3
    states = [model.state_dict() for model in by_peft]
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task_type", "architecture"),
    [
        ("TOKEN_CLS", "BertForTokenClassification"),
        ("QUESTION_ANS", "BertForQuestionAnswering"),
        (None, "BertForMaskedLM"),
    ],
)
def test_heads_without_a_table_on_a_backbone_with_one(tmp_path: Path, task_type: str, architecture: str) -> None:
    base = tiny_model(tmp_path / "base", MASKED_BERT)
    started = loaded_model(base, architecture, torch.float32)
    save_adapter(started, tmp_path / "a", 1, task_type=task_type, target_modules=["query", "output.dense"])
    spec = merge_spec(tmp_path / "out", [model_spec(tmp_path / "a")], {"name": "linear"}, heads="merged")
    spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    Engine(CPU).merge(spec, silent)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    expected = merged_by_peft(loaded_model(base, architecture), tmp_path / "a").state_dict()
    found = loaded_model(tmp_path / "out" / "model", architecture).state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"architectures": None},
        {"architectures": ["TFBertForMaskedLM"]},
        {"architectures": ["OwnForMaskedLM"], "model_type": "own"},
        {"architectures": ["OwnForPreTraining"], "model_type": "own", "tie_word_embeddings": True},
    ],
)
def test_a_matrix_that_the_heads_class_ties_is_refused(tmp_path: Path, named: dict[str, Any]) -> None:
    """PEFT leaves the head's copy as it was, and so unties them, by whatever name the class goes."""
    base = tiny_model(tmp_path / "base", MASKED_BERT)
    started = loaded_model(base, "BertForMaskedLM", torch.float32)
    save_adapter(started, tmp_path / "a", 1, target_modules=["query"], modules_to_save=["word_embeddings"])
    merged = merged_by_peft(loaded_model(base, "BertForMaskedLM"), tmp_path / "a").state_dict()
    assert not torch.equal(merged["cls.predictions.decoder.weight"], merged["bert.embeddings.word_embeddings.weight"])
    edit_json(base / "config.json", **named)
    with pytest.raises(InvalidCheckpoint, match=r"word_embeddings\.weight, which the base ties to another matrix"):
        inspect_model(tmp_path / "a", "local:a", inspect_checkpoint(base, "local:base"))


def test_a_bias_that_the_base_has_once_is_stored_twice_by_peft(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", MASKED_BERT)
    save_adapter(loaded_model(base, MASKED_BERT.architecture), tmp_path / "a", 1, target_modules=["query"], bias="all")
    info = adapted(tmp_path / "a", base)
    found = {tensor.slot.name for tensor in plan_merge([info]).backbone}
    assert "cls.predictions.bias" in found
    assert "cls.predictions.decoder.bias" not in found
    expected = merged_by_peft(loaded_model(base, MASKED_BERT.architecture), tmp_path / "a").state_dict()
    for name, tensor in read(info).items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=0, atol=ROUNDING)


def test_embeddings_of_a_class_that_is_not_known_and_has_no_logits_are_adapted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    loaded_model(tiny_model(tmp_path / "masked", MASKED_BERT), "BertModel", torch.float32).save_pretrained(base)
    started = loaded_model(base, "BertModel", torch.float32)
    save_adapter(started, tmp_path / "a", 1, target_modules=["query"], modules_to_save=["word_embeddings"])
    expected = merged_by_peft(loaded_model(base, "BertModel"), tmp_path / "a").state_dict()
    edit_json(base / "config.json", architectures=["OwnModel"], model_type="own")
    info = inspect_model(tmp_path / "a", "local:a", inspect_checkpoint(base, "local:base"))
    name = "embeddings.word_embeddings.weight"
    with TensorReader() as reader:
        torch.testing.assert_close(reader.read(info.tensors[name]).double(), expected[name].double())


def test_an_adapter_may_bring_the_pooler_that_its_base_lacks(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    edit_tensors(base, lambda ts: {n: t for n, t in ts.items() if not n.startswith(("classifier", "bert.pooler"))})
    edit_json(base / "config.json", architectures=["BertForMaskedLM"])
    adapter = tiny_adapter(tmp_path / "a", base, modules_to_save=["classifier", "pooler"])
    info = inspect_model(adapter, "local:a", inspect_checkpoint(base, "local:base"))
    plan = plan_merge([info], base=inspect_checkpoint(base, "local:base"))
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= {t.slot.name for t in plan.heads[0]}
    without = tiny_adapter(tmp_path / "b", base)
    info = inspect_model(without, "local:b", inspect_checkpoint(base, "local:base"))
    with pytest.raises(InvalidCheckpoint, match=r"no tensor bert\.pooler\.dense\.(bias|weight), which Bert"):
        plan_merge([info])
