"""Plans for architectures without a table, and every reason to refuse one, from headers alone."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Tensors, edit_json, edit_tensors, tiny_checkpoint
from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, QWEN2, T5, TINY_MODELS, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.config_differences import differences
from worker.engine.catalog.checkpoints.identity import identify
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.library import architecture, completed
from worker.engine.catalog.checkpoints.tensor_names import is_before_layers, layer_of, place_of, stacks_of
from worker.engine.catalog.contracts.spec import OutputSpec
from worker.engine.catalog.methods import AverageParameters, PassthroughParameters, RegMeanParameters
from worker.engine.catalog.planning.memory import RUNTIME_BYTES, MemoryNeeds, estimate
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.planner import plan_job, plan_merge
from worker.engine.catalog.primitives.errors import (
    EngineError,
    IncompatibleCheckpoints,
    InvalidCheckpoint,
    InvalidRequest,
)
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.slices import OutputSlice, Slice

Spoiling = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<model_type>-0`, the ancestor, and `-1`, `-2`, fine-tuned from it."""
    root = tmp_path_factory.mktemp("layouts")
    for name, model in TINY_MODELS.items():
        for seed in range(3):
            tiny_model(root / f"{name}-{seed}", model, seed=seed)
    return root


@pytest.fixture
def copied(originals: Path, tmp_path: Path) -> Callable[[TinyModel, int], Path]:
    def copy(model: TinyModel, seed: int) -> Path:
        name = f"{model.model_type}-{seed}"
        return Path(shutil.copytree(originals / name, tmp_path / name))

    return copy


Copied = Callable[[TinyModel, int], Path]


def plan(*folders: Path, base: Path | None = None, **how: Any) -> MergePlan:
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    ancestor = inspect_checkpoint(base, f"local:{base.name}") if base else None
    return plan_merge(infos, how.pop("dtype", "auto"), ancestor, **how)


def config(**changes: Any) -> Spoiling:
    return lambda folder: edit_json(folder / "config.json", **changes)


def added(name: str, tensor: torch.Tensor) -> Spoiling:
    return lambda folder: edit_tensors(folder, lambda tensors: {**tensors, name: tensor})


def removed(name: str) -> Spoiling:
    return lambda folder: edit_tensors(folder, lambda ts: {n: t for n, t in ts.items() if n != name})


def renamed(rename: Callable[[str], str]) -> Spoiling:
    return lambda folder: edit_tensors(folder, lambda tensors: {rename(n): t for n, t in tensors.items()})


def with_copies(model: TinyModel) -> Spoiling:
    def add(tensors: Tensors) -> Tensors:
        return {**tensors, **{copy: tensors[of].clone() for copy, of in model.tied.items()}}

    return lambda folder: edit_tensors(folder, add)


@pytest.mark.parametrize("model", TINY_MODELS.values(), ids=TINY_MODELS)
def test_every_tensor_is_merged_under_its_name_to_one_model(originals: Path, model: TinyModel) -> None:
    folders = [originals / f"{model.model_type}-{seed}" for seed in range(3)]
    found = plan(*folders[1:], base=folders[0])
    names = set(inspect_checkpoint(folders[1], "x").tensors)
    assert {tensor.slot.name for tensor in found.backbone} == names
    assert found.merges_heads
    assert [info.path for info in found.published] == [folders[1]]
    assert not any(tensor.is_copied for tensor in found.backbone)
    for tensor in found.backbone:
        assert [source.path.parent for source in tensor.sources] == folders[1:]
        assert tensor.base is not None
        assert tensor.base.path.parent == folders[0]
    owners = found.owners()
    assert sum(owners.values()) >= len(names)  # a fused matrix has several
    assert set(owners) == ({"rest"} if found.family is None else {"rest", *map(str, found.family.ownership.kinds)})
    assert found.bytes_to_read == 3 * found.bytes_to_write


def test_memory_of_a_merge_that_loads_no_model_is_that_of_blocks(originals: Path) -> None:
    found = plan(originals / "llama-1", originals / "llama-2")
    largest = 128 * 16  # the embeddings: smaller than a block
    of_one_thread = (4 * 2 + 6) * 4 * largest
    run = 2 * sum(tensor.nbytes for tensor in found.backbone)  # before it is published, by itself and by its tensors
    for method in (AverageParameters(), RegMeanParameters()):  # no layer that is solved for is as large as the blocks
        needs = MemoryNeeds(method, loads_models=False, threads=3)
        assert estimate(found, needs) == RUNTIME_BYTES + 3 * of_one_thread + run


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("h.0.attn.c_attn.bias", ("h", 0, "attn.c_attn.bias")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", ("encoder.block", 1, "layer.0.SelfAttention.q.weight")),
        ("bert.encoder.layer.11.output.dense.bias", ("bert.encoder.layer", 11, "output.dense.bias")),
        ("model.layers.0.moe.experts.7.w1.weight", ("model.layers", 0, "moe.experts.7.w1.weight")),
        ("lm_head.weight", None),
        ("model.layers.weight", None),
        ("classifier.0.weight", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_layer_is_the_first_number_of_a_list_of_layers(name: str, expected: tuple[str, int, str] | None) -> None:
    found = layer_of(name)
    assert (found and (found.stack, found.number, found.inner)) == expected


def test_depth_runs_from_before_the_first_layer_to_after_the_last_of_each_list() -> None:
    names = [
        "model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "shared.weight",
        "encoder.block.0.x.weight", "encoder.block.1.x.weight", "encoder.block.2.x.weight",
        "decoder.block.0.x.weight", "decoder.block.1.x.weight",
        "model.norm.weight", "transformer.ln_f.weight", "lm_head.weight", "embed_out.weight", "score.weight",
    ]  # fmt: skip
    stacks = stacks_of(names)
    assert stacks == {"encoder.block": 3, "decoder.block": 2}
    assert [place_of(name, stacks).depth for name in names] == [0, 0, 0, 0, 0, 0.5, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "is_before"),
    [
        ("model.encoder.conv1.weight", True),  # Whisper
        ("feature_extractor.conv_layers.0.conv.weight", True),  # wav2vec 2.0
        ("encoder.pos_conv_embed.conv.bias", True),
        ("embeddings.position_embeddings.weight", True),
        ("vision.patch_embed.proj.weight", True),
        ("perceiver.input_preprocessor.position_encoding.weight", True),
        ("conv_head.weight", False),
        ("classifier.conv.weight", False),
        ("position_predictor.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_what_is_before_the_layers_is_told_by_whole_words(name: str, is_before: bool) -> None:
    assert is_before_layers(name) is is_before


@pytest.mark.parametrize(
    ("model_type", "architecture_", "name", "is_before"),
    [
        ("distilbert", "DistilBertForSequenceClassification", "pre_classifier.weight", False),
        ("bigbird_pegasus", "BigBirdPegasusForCausalLM", "model.decoder.layernorm_embedding.weight", False),
        ("wav2vec2", "Wav2Vec2ForCTC", "wav2vec2.feature_projection.projection.weight", True),
        ("wav2vec2", "Wav2Vec2ForCTC", "wav2vec2.encoder.layer_norm.weight", True),
        ("bart", "BartForConditionalGeneration", "model.encoder.layernorm_embedding.weight", True),
        ("gpt2", "GPT2LMHeadModel", "wpe.weight", True),  # without the prefix
        ("gpt2", "GPT2LMHeadModel", "ln_f.weight", False),
        ("llava", "LlavaForConditionalGeneration", "language_model.model.embed_tokens.weight", True),  # as in files
        ("llava", "LlavaForConditionalGeneration", "language_model.lm_head.weight", False),
        ("llama", "LlamaForCausalLM", "own_embed.weight", True),  # unknown, so that its name tells
    ],
)
def test_what_a_known_class_uses_before_its_layers_is_told_by_the_order_of_its_modules(
    model_type: str, architecture_: str, name: str, is_before: bool
) -> None:
    known = architecture({"model_type": model_type}, architecture_)
    assert known is not None
    assert is_before_layers(name, known) is is_before


@pytest.mark.parametrize("stored", [(1,), (2,), (1, 2), (0, 1, 2), (0,)], ids=str)
@pytest.mark.parametrize("model", [QWEN2, GPT2, T5, MASKED_BERT], ids=lambda model: model.model_type)
def test_a_stored_copy_of_a_tied_matrix_is_the_matrix(
    originals: Path, copied: Copied, model: TinyModel, stored: tuple[int, ...]
) -> None:
    folders = [copied(model, seed) for seed in range(3)]
    expected = {t.slot.name for t in plan(*folders[1:], base=folders[0]).backbone}
    for seed in stored:
        with_copies(model)(folders[seed])
    found = plan(*folders[1:], base=folders[0])
    assert {tensor.slot.name for tensor in found.backbone} == expected
    assert sorted((copy.path.parent.name, copy.name, of.name) for copy, of in found.tied) == sorted(
        (folders[seed].name, copy, of) for seed in stored for copy, of in model.tied.items()
    )


@pytest.mark.parametrize(
    ("model", "changes", "is_tied"),
    [
        (QWEN2, {}, False),  # the library's default for this kind of model
        (GPT2, {}, True),
        (QWEN2, {"model_type": "own", "architectures": ["OwnLM"]}, None),
    ],
)
def test_where_a_configuration_does_not_say_the_librarys_default_ties_or_else_that_not_all_store_a_copy(
    copied: Copied, model: TinyModel, changes: dict[str, Any], is_tied: bool | None
) -> None:
    folders = [copied(model, seed) for seed in (1, 2)]
    for folder in folders:
        config(tie_word_embeddings=None, **changes)(folder)
    with_copies(model)(folders[1])
    if is_tied is False:
        assert_refused(partial(plan, *folders), EngineError, ["lm_head.weight"])
    else:
        assert "lm_head.weight" not in {tensor.slot.name for tensor in plan(*folders).backbone}
    with_copies(model)(folders[0])
    assert ("lm_head.weight" in {tensor.slot.name for tensor in plan(*folders).backbone}) is not is_tied


def test_t5_1_1_has_two_matrices(copied: Copied) -> None:
    folders = [copied(T5, seed) for seed in (1, 2)]
    for folder in folders:
        with_copies(T5)(folder)
        config(scale_decoder_outputs=False)(folder)
    names = {tensor.slot.name for tensor in plan(*folders).backbone}
    assert {"shared.weight", "lm_head.weight"} <= names
    assert not names & {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


MASK = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()


def test_buffers_are_copied_from_the_base_or_else_the_first_model_and_may_be_missing(copied: Copied) -> None:
    folders = [copied(GPT2, seed) for seed in range(3)]
    mask, ids, score = "transformer.h.0.attn.bias", "transformer.position_ids", "transformer.h.0.attn.masked_bias"
    for seed in (0, 1):
        added(mask, MASK)(folders[seed])
        added(score, torch.tensor(-1e4))(folders[seed])
    added(ids, torch.arange(64))(folders[1])
    added("transformer.h.1.attn.bias", MASK.bool())(folders[2])
    for base, owner in ((None, folders[1]), (folders[0], folders[0])):
        found = {t.slot.name: t for t in plan(*folders[1:], base=base, dtype="bfloat16").backbone}
        buffers = {name: tensor for name, tensor in found.items() if tensor.is_copied}
        assert buffers.keys() == {mask, ids, score}
        assert [len(tensor.sources) for tensor in buffers.values()] == [1, 1, 1]
        assert buffers[mask].sources[0].path.parent == owner
        assert [buffers[name].dtype for name in (mask, ids, score)] == ["U8", "I64", "F32"]
        assert {tensor.dtype for tensor in found.values() if not tensor.is_copied} == {"BF16"}
    added(mask, MASK[..., :8].contiguous())(folders[2])
    with pytest.raises(IncompatibleCheckpoints, match=r"h\.0\.attn\.bias has shape \[1, 1, 64, 64\]"):
        plan(*folders[1:])


def test_names_may_lack_the_prefix_of_what_lies_under_the_head(copied: Copied) -> None:
    first, second = copied(GPT2, 1), copied(GPT2, 2)
    expected = [tensor.slot.name for tensor in plan(first, second).backbone]
    renamed(lambda name: name.removeprefix("transformer."))(second)
    for models in ((first, second), (second, first)):
        assert sorted(tensor.slot.name for tensor in plan(*models).backbone) == sorted(expected)
    added("transformer.wte.weight", torch.zeros(128, 16))(second)
    with pytest.raises(InvalidCheckpoint, match=r"local:gpt2-2: tensor transformer\.wte\.weight is there under two"):
        plan(first, second)


def test_norms_may_be_spelt_as_they_were_before(copied: Copied) -> None:
    first, second = copied(MASKED_BERT, 1), copied(MASKED_BERT, 2)
    expected = {tensor.slot.name for tensor in plan(first, second).backbone}
    renamed(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))(
        second
    )
    found = {tensor.slot.name: tensor for tensor in plan(first, second).backbone}
    assert found.keys() == expected
    assert [s.name for s in found["bert.embeddings.LayerNorm.weight"].sources] == [
        "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma",
    ]  # fmt: skip


def test_the_plans_dtype_is_that_of_most_numbers(copied: Copied) -> None:
    folder = copied(LLAMA, 1)
    norm = "model.norm.weight"
    edit_tensors(folder, lambda ts: {n: t.float() if n == norm else t.bfloat16() for n, t in ts.items()})
    found = plan(folder)
    assert found.dtype == "BF16"
    assert {t.slot.name for t in found.backbone if t.dtype == "F32"} == {norm}


HARMLESS: dict[str, dict[str, Any]] = {
    "where it was": {"_name_or_path": "elsewhere", "transformers_version": "4.0.0", "unsloth_version": "1"},
    "how it is stored": {"dtype": "bfloat16", "torch_dtype": "float16", "use_cache": False},
    "ids of text's ends": {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 5},
    "what training reads": {"attention_dropout": 0.5, "initializer_range": 1.0, "problem_type": "x"},
    "length that rotary positions do not read": {"max_position_embeddings": 128},
    "labels of a head it has not": {"id2label": {"0": "a"}, "label2id": {"a": 0}},
    "a key that the other lacks": {"new_key": 1},
    "rotary positions as they were written before": {
        "rope_parameters": None, "rope_theta": 10000, "rope_scaling": None,
    },
    "a window that is not used": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_no_computation_may_differ(copied: Copied, case: str) -> None:
    first, second = copied(LLAMA, 1), copied(LLAMA, 2)
    config(use_sliding_window=False, sliding_window=4, max_window_layers=2)(first)
    config(**HARMLESS[case])(second)
    assert plan(first, second).backbone


UNLIKE: dict[str, tuple[TinyModel, Spoiling, list[str]]] = {
    "heads": (LLAMA, config(num_attention_heads=2), ["num_attention_heads", "4, 2"]),
    "norms": (LLAMA, config(rms_norm_eps=1e-3), ["rms_norm_eps", "1e-06, 0.001"]),
    "activation": (LLAMA, config(hidden_act="gelu"), ["hidden_act", "'silu', 'gelu'"]),
    "rotary base": (
        LLAMA, config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), ["rope_parameters.rope_theta"],
    ),
    "rotary base as it was written before": (
        LLAMA, config(rope_parameters=None, rope_theta=5e5), ["rope_parameters.rope_theta", "10000.0, 500000.0"],
    ),
    "rotary scaling": (
        LLAMA, config(rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2}),
        ["rope_parameters.rope_type", "'default', 'linear'"],
    ),
    "tied and untied": (LLAMA, config(tie_word_embeddings=True), ["tie_word_embeddings"]),
    "padding of a model whose positions may count from it": (MASKED_BERT, config(pad_token_id=3), ["pad_token_id"]),
    "architecture": (GPT2, config(architectures=["GPT2DoubleHeadsModel"]), ["GPT2LMHeadModel, GPT2DoubleHeadsModel"]),
    "kind of model": (LLAMA, config(model_type="mistral"), ["llama, mistral"]),
    "another shape": (
        LLAMA, added("model.norm.weight", torch.zeros(8)), ["model.norm.weight has shape [16]", "[8] in the second"],
    ),
    "another vocabulary": (
        LLAMA, lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"one"', '"uno"')
        ), ["tokenizers", "vocabulary"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_models_that_do_not_fit_are_refused_by_both_names(copied: Copied, case: str) -> None:
    model, spoil, words = UNLIKE[case]
    folders = [copied(model, seed) for seed in (1, 2)]
    spoil(folders[1])
    assert_refused(partial(plan, *folders), IncompatibleCheckpoints, [*(f"local:{f.name}" for f in folders), *words])


def test_padding_of_a_language_model_whose_positions_count_from_it_must_agree(tmp_path: Path) -> None:
    model = TinyModel("RobertaForCausalLM", "roberta", {**MASKED_BERT.settings, "is_decoder": True})
    folders = [tiny_model(tmp_path / f"roberta-{seed}", model, seed=seed, pad_token_id=seed) for seed in (1, 2)]
    assert_refused(partial(plan, *folders), IncompatibleCheckpoints, ["pad_token_id", "1, 2"])


def quantised(folder: Path) -> None:
    """Says so, and has integers by a name that no format is known by."""
    config(quantization_config={"bits": 4})(folder)
    added("model.layers.0.mlp.up_proj_blocks", torch.zeros(2, dtype=torch.uint8))(folder)


BAD: dict[str, tuple[Spoiling, list[str]]] = {
    "no kind of model": (config(model_type=None), ["no model_type"]),
    "quantised by its configuration": (quantised, ["quantised"]),
    "quantised by its tensors": (
        added("model.layers.0.mlp.up_proj.qweight", torch.zeros(2, dtype=torch.int32)), ["quantised", "qweight"],
    ),
    "more layers than there are": (config(num_hidden_layers=3), ["2 layers", "says 3 num_hidden_layers"]),
    "fewer layers than there are": (config(num_hidden_layers=1), ["2 layers", "says 1 num_hidden_layers"]),
    "an absurd number of layers": (config(num_hidden_layers=10**9), ["1000000000 num_hidden_layers"]),
    "an absurd number of layers further in": (
        config(text_config={"num_hidden_layers": 10**9}), ["1000000000 num_hidden_layers"],
    ),
    "a number of layers that is none": (config(num_hidden_layers="2"), ["num_hidden_layers", "type text", "takes int"]),
    "a number of layers that is a truth": (config(num_hidden_layers=True), ["num_hidden_layers", "type bool"]),
    "untied without a head": (
        removed("lm_head.weight"), ["lm_head.weight", "its configuration says tie_word_embeddings: false"],
    ),
    "untied by default without a head": (
        lambda folder: (removed("lm_head.weight")(folder), config(tie_word_embeddings=None)(folder)),
        ["lm_head.weight", "its configuration has no tie_word_embeddings, which is then false"],
    ),
    "integers for weights": (
        added("lm_head.weight", torch.zeros(4, dtype=torch.int8)), ["quantised", "lm_head.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_its_name_wherever_it_stands(copied: Copied, case: str, position: int) -> None:
    spoil, words = BAD[case]
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    spoil(folders[position])
    assert_refused(partial(plan, *folders), EngineError, [f"local:{folders[position].name}", *words])


BART = TinyModel(
    "BartForConditionalGeneration",
    "bart",
    {
        "d_model": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "max_position_embeddings": 64, "decoder_layers": 2, "pad_token_id": 1,
    },
    layers="encoder_layers",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "key", "which"),
    [
        (T5, "num_decoder_layers", "decoder"),
        (T5, "num_layers", "encoder"),
        (BART, "decoder_layers", "decoder"),
        (BART, "encoder_layers", "encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_each_stack_of_an_encoder_and_decoder_has_the_layers_of_its_own_key(
    tmp_path: Path, model: TinyModel, key: str, which: str
) -> None:
    folders = [tiny_model(tmp_path / f"m{seed}", model, seed=seed) for seed in (1, 2)]
    plan(*folders)
    for folder in folders:
        config(**{key: 1})(folder)
    assert_refused(partial(plan, *folders), InvalidCheckpoint, [f"2 layers of its {which}", f"says 1 {key}"])


@pytest.mark.parametrize(
    ("key", "tensor"), [("attention_bias", "self_attn.q_proj.bias"), ("mlp_bias", "mlp.gate_proj.bias")]
)
def test_biases_that_the_configuration_has_not_are_noted(copied: Copied, key: str, tensor: str) -> None:
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    name = f"model.layers.0.{tensor}"
    for folder in folders:
        added(name, torch.zeros(24 if "mlp" in tensor else 16))(folder)
    assert f"tensor {name} is not one that LlamaForCausalLM reads; it was merged all the same" in plan(*folders).notes
    for folder in folders:
        config(**{key: True})(folder)
    assert [identify(inspect_checkpoint(folder, "local:m")).unread for folder in folders] == [[], []]


def test_layers_that_predict_further_tokens_are_beyond_those_that_are_counted(copied: Copied) -> None:
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    for folder in folders:
        config(num_hidden_layers=1, num_nextn_predict_layers=1)(folder)
    assert plan(*folders).layers == 2


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (removed("model.norm.weight"), IncompatibleCheckpoints, ["model.norm.weight is missing in the base"]),
        (added("model.norm.weight", torch.zeros(8)), IncompatibleCheckpoints, ["[16], in the base [8]"]),
        (config(num_attention_heads=8), IncompatibleCheckpoints, ["num_attention_heads"]),
        (config(model_type="gpt2"), IncompatibleCheckpoints, ["llama, gpt2"]),
        (quantised, InvalidCheckpoint, ["quantised"]),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_name(
    originals: Path, copied: Copied, spoil: Spoiling, error: type[EngineError], words: list[str]
) -> None:
    base = copied(LLAMA, 0)
    spoil(base)
    models = [originals / "llama-1", originals / "llama-2"]
    assert_refused(partial(plan, *models, base=base), error, ["local:llama-0", *words])


def test_heads_cannot_be_kept_without_a_table(originals: Path) -> None:
    models = [originals / "llama-1", originals / "llama-2"]
    assert_refused(partial(plan, *models, heads="per_model"), InvalidRequest, ["LlamaForCausalLM", "output.heads"])
    assert plan(*models, heads="merged").merges_heads


def test_heads_of_classifiers_merge_where_labels_are_equal(tmp_path: Path) -> None:
    names = ["bad", "good"]
    first, second = (tiny_checkpoint(tmp_path / f"c{seed}", seed=seed, names=names) for seed in range(2))
    kept, merged = plan(first, second), plan(first, second, heads="merged")
    heads = {"classifier.weight", "classifier.bias"}
    assert not kept.merges_heads
    assert {t.slot.name for t in merged.backbone} == {t.slot.name for t in kept.backbone} | heads
    assert merged.merges_heads
    assert merged.family is kept.family
    third = tiny_checkpoint(tmp_path / "c2", seed=2, names=["good", "bad"])
    refused = partial(plan, first, third, heads="merged")
    assert_refused(refused, IncompatibleCheckpoints, ["local:c0", "local:c2", "bad, good", "good, bad"])
    refused = partial(plan, first, tiny_checkpoint(tmp_path / "c3", labels=3), heads="merged")
    assert_refused(refused, IncompatibleCheckpoints, ["local:c0", "local:c3", "LABEL_2"])
    config(problem_type="multi_label_classification")(second)
    refused = partial(plan, first, second, heads="merged")
    assert_refused(refused, IncompatibleCheckpoints, ["classification, multi_label"])
    without_head = plan(first, base=copy_without_head(first, tmp_path / "base"), heads="merged")
    assert {t.slot.name for t in without_head.backbone if t.base is None} == heads
    assert ["base has no tensor classifier.bias" in note for note in without_head.notes] == [True]


def copy_without_head(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    edit_tensors(to, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith("classifier")})
    return to


def test_classifiers_without_a_table_need_equal_labels(tmp_path: Path) -> None:
    model = TinyModel("StableLmForSequenceClassification", "stablelm", LLAMA.settings)
    labels: dict[str, Any] = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    first, second = (tiny_model(tmp_path / f"c{seed}", model, seed=seed, pad_token_id=2, **labels) for seed in (1, 2))
    assert "score.weight" in {tensor.slot.name for tensor in plan(first, second).backbone}
    config(id2label={"0": "yes", "1": "no"})(second)
    assert_refused(partial(plan, first, second), IncompatibleCheckpoints, ["no, yes", "yes, no"])


DOUBT = "nothing says that they are of one task: their labels have no names of their own (LABEL_0, LABEL_1)"


def own_classifiers(folder: Path, *names: str, **changes: object) -> list[Path]:
    """Classifiers of a kind of model that transformers does not have."""
    model = TinyModel("StableLmForSequenceClassification", "stablelm", LLAMA.settings)
    folders = [tiny_model(folder / name, model, seed=seed, pad_token_id=2) for seed, name in enumerate(names)]
    for one in folders:
        config(model_type="own", architectures=["OwnForSequenceClassification"], **changes)(one)
    return folders


def test_heads_of_labels_without_names_are_doubted_to_be_of_one_task(tmp_path: Path) -> None:
    first, second = own_classifiers(tmp_path / "own", "a", "b")
    found = plan(first, second)
    assert "score.weight" in {tensor.slot.name for tensor in found.backbone}
    assert [note for note in found.notes if isinstance(note, Doubt) and DOUBT in note and "local:b" in note]
    for one in (first, second):  # a class whose name tells nothing, with a head that tells
        config(architectures=["Own"])(one)
    assert [note for note in plan(first, second).notes if isinstance(note, Doubt) and DOUBT in note]
    with_table = [tiny_checkpoint(tmp_path / f"c{seed}", seed=seed) for seed in range(2)]
    assert [note for note in plan(*with_table, heads="merged").notes if isinstance(note, Doubt) and DOUBT in note]
    assert not [note for note in plan(*with_table).notes if isinstance(note, Doubt)]
    names = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    named = own_classifiers(tmp_path / "named", "a", "b", **names)
    assert not [note for note in plan(*named).notes if isinstance(note, Doubt)]


@pytest.mark.parametrize(
    ("key", "values"),
    [("problem_type", ["regression", "single_label_classification"]), ("finetuning_task", ["qnli", "rte"])],
)
def test_heads_that_say_they_are_of_different_tasks_are_refused(tmp_path: Path, key: str, values: list[str]) -> None:
    models = own_classifiers(tmp_path, "a", "b")
    for folder, value in zip(models, values, strict=True):
        config(**{key: value})(folder)
    assert_refused(partial(plan, *models), IncompatibleCheckpoints, ["local:a", "local:b", key, *values])


def test_slices_that_merge_heads_of_labels_without_names_are_doubted(tmp_path: Path) -> None:
    model = TinyModel("StableLmForSequenceClassification", "stablelm", LLAMA.settings)
    folders = [tiny_model(tmp_path / name, model, seed=seed, pad_token_id=2) for seed, name in enumerate("ab")]
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    for last, is_doubted in (("ab", True), ("b", False)):
        slices = [
            OutputSlice(sources=[Slice(model=name, layers=(start, start + 1)) for name in names])
            for start, names in ((0, "ab"), (1, last))
        ]
        found = plan_job(AverageParameters(), ["a", "b"], infos, OutputSpec(), slices=slices)
        assert any(isinstance(note, Doubt) and DOUBT in note for note in found.notes) is is_doubted


def stacked(slices: list[tuple[str, int, int]], *folders: Path) -> MergePlan:
    parts = [Slice(model=model, layers=(start, stop)) for model, start, stop in slices]
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    return plan_job(PassthroughParameters(slices=parts), [folder.name for folder in folders], infos, OutputSpec())


def test_slices_become_the_layers_in_their_order(originals: Path) -> None:
    models = [originals / "qwen2-1", originals / "qwen2-2"]
    found = stacked([("qwen2-2", 0, 2), ("qwen2-1", 1, 2), ("qwen2-2", 1, 2)], *models)
    sources = {t.slot.name: (t.sources[0].path.parent.name, t.sources[0].name) for t in found.backbone}
    q = "model.layers.{}.self_attn.q_proj.weight"
    expected = [("qwen2-2", 0), ("qwen2-2", 1), ("qwen2-1", 1), ("qwen2-2", 1)]
    assert [sources[q.format(i)] for i in range(4)] == [(model, q.format(number)) for model, number in expected]
    assert q.format(4) not in sources
    assert sources["model.embed_tokens.weight"][0] == "qwen2-2"
    assert sources["model.norm.weight"][0] == "qwen2-2"
    assert all(tensor.is_copied for tensor in found.backbone)
    [published] = found.published
    assert published.config["num_hidden_layers"] == 4
    assert published.config["layer_types"] == ["full_attention"] * 4
    assert [tensor.place.depth for tensor in found.backbone if tensor.slot.name == q.format(1)] == [1 / 3]


def test_what_follows_the_layers_is_the_last_slices_models(originals: Path) -> None:
    found = stacked([("llama-1", 0, 1), ("llama-2", 0, 2)], originals / "llama-1", originals / "llama-2")
    owners = {t.slot.name: t.sources[0].path.parent.name for t in found.backbone if t.slot.layer is None}
    assert owners == {
        "model.embed_tokens.weight": "llama-1", "model.norm.weight": "llama-2", "lm_head.weight": "llama-2",
    }  # fmt: skip
    run = 2 * sum(tensor.nbytes for tensor in found.backbone)  # as it is read, and as it is run
    assert estimate(found, MemoryNeeds(AverageParameters(), loads_models=False)) == RUNTIME_BYTES + run


STACKS: dict[str, tuple[TinyModel, Spoiling | None, list[tuple[str, int, int]], type[EngineError], list[str]]] = {
    "layers that are not there": (
        LLAMA, None, [("llama-1", 0, 2), ("llama-2", 1, 3)], InvalidRequest, ["local:llama-2 has 2 layers", "[1, 3]"],
    ),
    "two lists of layers": (
        T5, None, [("t5-1", 0, 2), ("t5-2", 0, 2)], InvalidCheckpoint, ["2 lists of layers", "decoder.block"],
    ),
    "another shape": (
        LLAMA, added("model.layers.1.input_layernorm.weight", torch.zeros(8)), [("llama-1", 0, 2), ("llama-2", 1, 2)],
        IncompatibleCheckpoints, ["layer 1 of the second"],
    ),
    "another setting": (
        LLAMA, config(hidden_act="gelu"), [("llama-1", 0, 2), ("llama-2", 1, 2)], IncompatibleCheckpoints,
        ["hidden_act"],
    ),
    "a list that says nothing of its layers": (
        QWEN2, config(layer_types=None), [("qwen2-1", 0, 2), ("qwen2-2", 1, 2)], IncompatibleCheckpoints,
        ["layer_types", "layer 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
def test_stacks_that_cannot_be_are_refused(copied: Copied, case: str) -> None:
    model, spoil, slices, error, words = STACKS[case]
    folders = [copied(model, seed) for seed in (1, 2)]
    if spoil:
        spoil(folders[1])
    assert_refused(partial(stacked, slices, *folders), error, words)


def test_slices_of_two_lists_are_refused_in_words_of_any_method(copied: Copied) -> None:
    infos = [inspect_checkpoint(copied(T5, seed), f"local:t5-{seed}") for seed in (1, 2)]
    sources = [{"model": name, "layers": [1, 2]} for name in "ab"]
    slices = [OutputSlice.model_validate({"sources": sources})]
    with pytest.raises(InvalidCheckpoint, match=r"it has 2 lists of layers .*; leave slices out to merge it whole"):
        plan_job(AverageParameters(), ["a", "b"], infos, OutputSpec(), slices=slices)


def test_models_of_different_depths_stack(tmp_path: Path) -> None:
    models = [tiny_model(tmp_path / name, seed=seed, layers=seed + 1) for seed, name in ((1, "a"), (2, "b"))]
    found = stacked([("a", 0, 2), ("b", 2, 3)], *models)
    assert found.published[0].config["num_hidden_layers"] == 3
    assert json.loads((models[0] / "config.json").read_text())["num_hidden_layers"] == 2


def test_differences_are_named_by_their_path() -> None:
    ours = {"text_config": {"hidden_act": "silu", "_name_or_path": "x"}, "sliding_window": None, "a": [1]}
    theirs = {"text_config": {"hidden_act": "relu", "_name_or_path": "y"}, "sliding_window": 8, "b": 2}
    assert sorted(differences(ours, theirs)) == [
        ("sliding_window", None, 8), ("text_config.hidden_act", "silu", "relu"),
    ]  # fmt: skip


def test_nan_equals_itself() -> None:
    nan = float("nan")
    assert not list(differences({"scale": nan, "scales": [1, nan]}, {"scale": float("nan"), "scales": [1, -nan]}))
    assert [key for key, *_ in differences({"scale": nan}, {"scale": 1.0})] == ["scale"]


def test_values_of_other_types_show_it(tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / name) for name in "ab"]
    edit_json(folders[1] / "config.json", attention_bias="False")
    infos = [inspect_checkpoint(folder, folder.name) for folder in folders]
    with pytest.raises(
        InvalidCheckpoint, match="attention_bias 'False', which is of type text; transformers takes bool"
    ):
        plan_merge(infos)


def assert_refused(planning: Callable[[], object], error: type[EngineError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        planning()
    missing = [word for word in words if word not in caught.value.message]
    assert not missing, caught.value.message


# --- whose settings count -----------------------------------------------------------------------------------

SETTLED: dict[str, tuple[dict[str, Any], str]] = {
    "rotary base": ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta"),
    "rotary base as it was written before": (
        {"rope_parameters": None, "rope_theta": 5e5},
        "rope_parameters.rope_theta",
    ),
    "rotary scaling": (
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_parameters.rope_type",
    ),
    "epsilon": ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "window": ({"sliding_window": 8}, "sliding_window"),
}


@pytest.mark.parametrize("case", SETTLED)
def test_settings_that_no_shape_shows_are_those_of_the_model_that_counts(copied: Copied, case: str) -> None:
    changes, key = SETTLED[case]
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    config(sliding_window=4)(folders[0])
    config(sliding_window=4)(folders[1])
    config(**changes)(folders[1])
    assert_refused(partial(plan, *folders), IncompatibleCheckpoints, [key, "name a model in output.config_from"])
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    for whose in infos:
        found = plan_merge(infos, config_from=whose)
        [published] = found.published
        assert not list(differences(completed(published.config), completed(whose.config)))
        assert any(key in note and f"that of {whose.source} counts" in note for note in found.notes), found.notes


UNSETTLED: dict[str, dict[str, Any]] = {
    "heads": {"num_attention_heads": 2},
    "shared heads": {"num_key_value_heads": 4},
    "ties": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", UNSETTLED)
def test_settings_that_say_what_tensors_are_for_are_refused_whoever_counts(copied: Copied, case: str) -> None:
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    config(**UNSETTLED[case])(folders[1])
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    assert_refused(partial(plan_merge, infos, config_from=infos[0]), IncompatibleCheckpoints, [*UNSETTLED[case]])


def test_a_list_over_layers_that_one_configuration_lacks_is_not_guessed(copied: Copied) -> None:
    folders = [copied(QWEN2, seed) for seed in (1, 2)]
    config(use_sliding_window=True, sliding_window=4)(folders[0])
    config(use_sliding_window=True, sliding_window=4, layer_types=None)(folders[1])
    assert_refused(partial(plan, *folders), IncompatibleCheckpoints, ["layer_types", "output.config_from"])


def test_a_bases_settings_count_where_they_are_asked_for(copied: Copied) -> None:
    base, *folders = (copied(LLAMA, seed) for seed in range(3))
    config(rms_norm_eps=1e-3)(base)
    ancestor = inspect_checkpoint(base, "local:base")
    infos = [inspect_checkpoint(folder, f"local:{folder.name}") for folder in folders]
    assert plan_merge(infos, base=ancestor).published[0].config["rms_norm_eps"] == 1e-6
    found = plan_merge(infos, base=ancestor, config_from=ancestor)
    assert found.published[0].config["rms_norm_eps"] == 1e-3
    assert ["that of local:base counts" in note for note in found.notes] == [True]


# --- what a base need not have --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "noted"),
    [({"pad_token_id": 5}, []), ({"hidden_act": "gelu"}, ["hidden_act"]), ({"rms_norm_eps": 1e-3}, ["rms_norm_eps"])],
)
def test_settings_that_matter_when_a_model_runs_may_differ_in_a_base(
    originals: Path, copied: Copied, changes: dict[str, Any], noted: list[str]
) -> None:
    base = copied(LLAMA, 0)
    config(**changes)(base)
    notes = plan(originals / "llama-1", originals / "llama-2", base=base).notes
    assert [key for key in noted if any(key in note for note in notes)] == noted
    assert len(notes) == len(noted)


def test_what_a_base_lacks_of_a_head_has_no_base(tmp_path: Path) -> None:
    model = TinyModel("StableLmForSequenceClassification", "stablelm", {**LLAMA.settings, "pad_token_id": 0})
    models = [tiny_model(tmp_path / f"m{seed}", model, seed=seed) for seed in (1, 2)]
    for folder in models:
        config(id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})(folder)
    pre_trained = TinyModel("StableLmForCausalLM", "stablelm", LLAMA.settings)
    found = plan(*models, base=tiny_model(tmp_path / "base", pre_trained))
    assert {t.slot.name for t in found.backbone if t.base is None} == {"score.weight"}
    assert found.notes == (
        "local:base has no tensor score.weight to compare with: it was averaged by the models' weights",
    )


def test_a_head_that_a_base_ties_is_compared_with_what_it_ties(tmp_path: Path) -> None:
    settings = {**QWEN2.settings, "tie_word_embeddings": False}
    untied = TinyModel("Qwen2ForCausalLM", "qwen2", settings)
    models = [tiny_model(tmp_path / f"m{seed}", untied, seed=seed) for seed in (1, 2)]
    found = plan(*models, base=tiny_model(tmp_path / "base", QWEN2))
    [head] = [tensor for tensor in found.backbone if tensor.slot.name == "lm_head.weight"]
    assert head.base is not None
    assert head.base.name == "model.embed_tokens.weight"
    assert head.base.path.parent.name == "base"


def test_what_only_some_models_have_and_nobody_reads_is_left_out_with_a_note(copied: Copied) -> None:
    folders = [copied(LLAMA, seed) for seed in (1, 2)]
    added("model.extra", torch.zeros(1))(folders[1])
    found = plan(*folders)
    assert "model.extra" not in {tensor.slot.name for tensor in found.backbone}
    assert ["model.extra was left out" in note for note in found.notes] == [True]


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_t5_1_1_without_a_stored_head_is_tied(copied: Copied, stored: int) -> None:
    folders = [copied(T5, seed) for seed in (1, 2)]
    for place, folder in enumerate(folders):
        config(tie_word_embeddings=False)(folder)
        if place < stored:
            with_copies(T5)(folder)
    names = {tensor.slot.name for tensor in plan(*folders).backbone}
    assert ("lm_head.weight" in names) is (stored == 2)
