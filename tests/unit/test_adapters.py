"""Reading adapters: what their headers say, and how every bad one is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import edit_json, edit_tensors, tiny_base, tiny_checkpoint
from tests.tiny_adapters import edit_adapter, tiny_adapter
from tests.tiny_families import TINY_BERT, TINY_FAMILIES
from worker.engine.catalog.checkpoints.adapters import inspect_model
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import checkpoint_state, inspect_checkpoint
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint
from worker.engine.catalog.tasks import task_of

SOURCE = "local:adapter"
MODULE = "base_model.model.bert.encoder.layer.0.attention.self.query"
WORDS = "base_model.model.bert.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, and `adapter` for two labels."""
    root = tmp_path_factory.mktemp("saved")
    tiny_adapter(root / "adapter", tiny_base(root / "base"))
    return root


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "base", tmp_path / "base"))


def inspect(adapter: Path, base: Path) -> CheckpointInfo:
    return inspect_model(adapter, SOURCE, inspect_checkpoint(base, "local:base"))


def refusal(adapter: Path, base: Path) -> EngineError:
    with pytest.raises(EngineError) as refused:
        inspect(adapter, base)
    return refused.value


def test_an_adapter_is_the_checkpoint_that_it_makes_of_its_base(adapter: Path, base: Path) -> None:
    info = inspect(adapter, base)
    assert (info.source, info.architecture) == (SOURCE, "BertForSequenceClassification")
    assert info.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    query = info.tensors["bert.encoder.layer.0.attention.self.query.weight"]
    assert (query.path.parent, query.shape, query.dtype) == (base, (16, 16), "F32")
    assert query.delta is not None
    assert (query.delta.a.path.parent, query.delta.scaling, query.delta.transposed) == (adapter, 1.5, False)
    assert query.nbytes == 4 * (16 * 16 + 2 * 4 * 16)
    key = info.tensors["bert.encoder.layer.0.attention.self.key.weight"]
    assert key.delta is None
    head = info.tensors["classifier.weight"]
    assert (head.path.parent, head.shape) == (adapter, (2, 16))


def test_tokenizer_and_labels_are_the_adapter_s_or_else_the_base_s(adapter: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "classifier", names=["bad", "good"])
    assert inspect(adapter, base).tokenizer_path == adapter
    assert task_of(inspect(adapter, base)).label_ids == {"bad": 0, "good": 1}
    edit_json(base / "config.json", problem_type="single_label_classification")
    shutil.copy(base / "config.json", adapter / "config.json")
    edit_json(adapter / "config.json", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    assert task_of(inspect(adapter, base)).label_ids == {"no": 0, "yes": 1}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    info = inspect(adapter, base)
    assert (info.tokenizer_path, info.vocabulary) == (base, inspect_checkpoint(base, "").vocabulary)


def test_another_number_of_labels_has_other_names(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", names=["bad", "good"], problem_type="single_label_classification")
    adapter = tiny_adapter(tmp_path / "adapter", base, labels=1)
    assert task_of(inspect(adapter, base)).name == "regression"


def test_the_state_changes_with_the_adapter_s_files(adapter: Path, base: Path) -> None:
    before = checkpoint_state(inspect(adapter, base))
    edit_json(adapter / "adapter_config.json", lora_alpha=7)
    assert checkpoint_state(inspect(adapter, base)) != before


def test_patterns_match_the_ends_of_names_as_in_peft(adapter: Path, base: Path) -> None:
    patterns = {r"^bert\.encoder\.layer\.1\..*query": 8, "query": 4, "alu": 12}
    edit_json(adapter / "adapter_config.json", alpha_pattern=patterns)
    tensors = inspect(adapter, base).tensors

    def scaling(layer: int, module: str) -> float:
        delta = tensors[f"bert.encoder.layer.{layer}.attention.self.{module}.weight"].delta
        assert delta is not None
        return delta.scaling

    assert [scaling(0, "query"), scaling(1, "query"), scaling(0, "value")] == [1, 2, 1.5]


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit_adapter(
        folder, lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}
    )


def added(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda folder: edit_adapter(folder, lambda tensors: {**tensors, name: torch.zeros(shape, dtype=dtype)})


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without(*parts: str) -> Callable[[Path], None]:
    """Without the tensors whose names have one of these in them."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return lambda folder: edit_adapter(folder, edit)


# What is done to a good adapter, and what the refusal must say.
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another kind of adapter": (configured(peft_type="LOHA"), ["peft_type LOHA", "only LORA"]),
    "no kind": (configured(peft_type=None), ["peft_type None"]),
    "DoRA": (configured(use_dora=True), ["use_dora", "merge_and_unload"]),
    "DoRA's tensors": (added(f"{MODULE}.lora_magnitude_vector.weight", 16), ["lora_magnitude_vector", "no plain LoRA"]),
    "parameters as targets": (configured(target_parameters=["experts"]), ["target_parameters"]),
    "layers that are repeated": (configured(layer_replication=[[0, 1]]), ["layer_replication"]),
    "what is not known": (configured(use_something_new=True), ["use_something_new", "merge_and_unload"]),
    "a base that was changed": (configured(init_lora_weights="pissa_niter_4"), ["pissa_niter_4", "path_initial_model"]),
    "LoftQ": (configured(init_lora_weights="loftq"), ["loftq"]),
    "no rank": (configured(r=None), ["adapter_config.json: r"]),
    "a rank of another size": (configured(r=8), [f"{MODULE}.lora_A.weight", "[4, 16]", "its rank is 8"]),
    "an alpha that is none": (configured(lora_alpha="x"), ["lora_alpha"]),
    "an infinite alpha": (configured(alpha_pattern={"query": float("inf")}), ["alpha_pattern.query"]),
    "a malformed pattern": (configured(alpha_pattern={"(": 1}), ["pattern '('", "merge_and_unload"]),
    "fewer targets than tensors": (
        configured(target_modules=["value"]),
        ["adapter_model.safetensors", f"{MODULE}.lora_A.weight", "adapter_config.json: target_modules leaves out"],
    ),
    "no targets": (configured(target_modules=None), ["adapter_config.json: target_modules is missing"]),
    "targets that are no names": (configured(target_modules=[1]), ["adapter_config.json: target_modules"]),
    "a pattern of targets that does not match": (
        configured(target_modules=r".*layer\.0\..*"), ["layer.1.attention.self.query.lora_A.weight", "target_modules"],
    ),
    "a pattern of targets that looks ahead": (
        configured(target_modules=r"(?=.*query).*"), ["target_modules: the pattern", "merge_and_unload"],
    ),
    "targets that are excluded": (
        configured(exclude_modules=["query"]), [f"{MODULE}.lora_A.weight", "exclude_modules leaves out"],
    ),
    "targets that a pattern excludes": (configured(exclude_modules=".*self.query"), ["exclude_modules leaves out"]),
    "targets in other layers": (
        configured(layers_to_transform=[0]), ["layer.1.attention.self.query.lora_A", "layers_to_transform leaves out"],
    ),
    "layers of another list": (
        configured(layers_to_transform=[0, 1], layers_pattern="blocks"), [f"{MODULE}.lora_A", "layers_to_transform"],
    ),
    "a pattern for lists of layers": (
        configured(layers_to_transform=[0, 1], layers_pattern="(a*)*"), ["layers_pattern has '(a*)*'", "no name"],
    ),
    "layers for a pattern": (
        configured(target_modules=".*(query|value)", layers_to_transform=[0, 1]), ["layers_to_transform is only for"],
    ),
    "lists of layers without layers": (configured(layers_pattern="layer"), ["layers_pattern is only for"]),
    "layers that are no numbers": (configured(layers_to_transform=["0", "1"]), ["layers_to_transform"]),
    "targets that are stored whole": (
        configured(modules_to_save=["attention"]), [f"{MODULE}.lora_A.weight", "modules_to_save", "leaves out"],
    ),
    "all linear layers and an embedding": (
        lambda folder: (
            added(f"{WORDS}.lora_embedding_A", 4, 100)(folder),
            added(f"{WORDS}.lora_embedding_B", 16, 4)(folder),
            configured(target_modules="all-linear")(folder),
        ),
        [f"{WORDS}.lora_embedding_A", "target_modules leaves out"],
    ),
    "an embedding as a linear layer": (
        lambda folder: (
            renamed("layer.0.attention.self.query", "word_embeddings")(folder),
            configured(target_modules=["word_embeddings", "query", "value"])(folder),
        ),
        ["word_embeddings.lora_A.weight", "PEFT reads lora_embedding_A"],
    ),
    "a linear layer as an embedding": (
        lambda folder: (
            renamed("query.lora_A.weight", "query.lora_embedding_A")(folder),
            renamed("query.lora_B.weight", "query.lora_embedding_B")(folder),
        ),
        ["query.lora_embedding_A", "of an embedding"],
    ),
    "factors of two kinds": (
        renamed(f"{MODULE}.lora_A.weight", f"{MODULE}.lora_embedding_A"),
        [f"{MODULE}.lora_embedding_A", "another kind"],
    ),
    "no tensors of what is stored whole": (
        configured(modules_to_save=["classifier", "pooler"]), ["no tensor bert.pooler.dense.", "modules_to_save names"],
    ),
    "two factors of one module": (
        added(f"{MODULE}.base_layer.lora_A.weight", 4, 16), [f"{MODULE}.base_layer.lora_A.weight", "both of"],
    ),
    "a bias of an adapted layer": (added(f"{MODULE}.bias", 16), [f"{MODULE}.bias", f"{MODULE}.base_layer.bias"]),
    "a wrapped bias of another layer": (
        added(f"{MODULE.replace('query', 'key')}.base_layer.bias", 16), ["key.base_layer.bias", "no matrices"],
    ),
    "a copy without what it is of": (
        renamed("model.classifier.weight", "model.classifier.modules_to_save.weight"),
        ["classifier.modules_to_save.weight", "base_model.model.classifier.weight", "missing"],
    ),
    "a switch that is text": (configured(use_rslora="false"), ["use_rslora"]),
    "another task": (configured(task_type="CAUSAL_LM"), ["base_model.model.classifier.", "not in the base"]),
    "a pickle": (pickled, ["adapter_model.bin", "save_file"]),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["safetensors is missing"]),
    "a whole model beside it": (
        lambda folder: shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors"),
        ["model.safetensors are both there"],
    ),
    "no tensors": (without(""), ["adapter_model.safetensors has no tensor"]),
    "no matrices in one layer": (
        without("layer.1.attention.self.query"), ["bert.encoder.layer.1.attention.self.query", "target_modules names"],
    ),
    "no matrices of one kind": (without("query"), ["encoder.layer.0.attention.self.query", "target_modules names"]),
    "no matrices at all": (without("lora_"), ["attention.self.", "target_modules names"]),
    "a scaling beyond float32": (configured(lora_alpha=1e300), ["lora_alpha", "2.5e+299", "float32"]),
    "a scaling of one module beyond float32": (
        configured(alpha_pattern={"query": -1e300}), ["alpha_pattern", "attention.self.query", "float32"],
    ),
    "half a pair": (without(f"{MODULE}.lora_B"), ["attention.self.query", "lora_A and lora_B"]),
    "a module that the base has not": (
        renamed("layer.1", "layer.7"), ["layer.7.attention", "not in the base", "local:base"],
    ),
    "a whole tensor that the base has not": (
        added("base_model.model.adapter.weight", 2), ["model.adapter.weight", "not in the base"],
    ),
    "a whole tensor of another shape": (
        added("base_model.model.bert.pooler.dense.bias", 3), ["pooler.dense.bias", "[3], in the base [16]"],
    ),
    "names that are not PEFT's": (renamed("base_model.model.", ""), ["begin with base_model.model."]),
    "integers": (added(f"{MODULE}.bias", 16, dtype=torch.int64), ["dtype I64"]),
    "factors that do not fit": (added(f"{MODULE}.lora_B.weight", 17, 4), ["lora_B of [17, 4]", "[16, 16]"]),
    "a convolution": (added(f"{MODULE}.lora_A.weight", 4, 16, 3), ["no matrix"]),
    "a vector as target": (
        lambda folder: (
            renamed("attention.self.query", "output.LayerNorm")(folder),
            configured(target_modules=["query", "value", "LayerNorm"])(folder),
        ),
        ["output.LayerNorm", "no matrix"],
    ),
    "code in a configuration": (
        lambda folder: (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}'), ["auto_map"],
    ),
    "a header that is cut off": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), ["truncated"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_available_or_does_not_fit_is_refused_by_name(adapter: Path, base: Path, case: str) -> None:
    spoil, says = REFUSED[case]
    spoil(adapter)
    message = refusal(adapter, base).message
    assert SOURCE in message
    for words in says:
        assert words in message


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"exclude_modules": ".*1.*"}], ids=str
)
def test_layers_may_be_chosen(adapter: Path, base: Path, settings: dict[str, Any]) -> None:
    without("layer.1.attention.self")(adapter)
    configured(**settings)(adapter)
    tensors = inspect(adapter, base).tensors
    deltas = [tensors[f"bert.encoder.layer.{layer}.attention.self.query.weight"].delta for layer in (0, 1)]
    assert [delta is None for delta in deltas] == [False, True]


def test_without_a_base_the_refusal_names_the_one_it_was_trained_on(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/bert")
    with pytest.raises(InvalidCheckpoint, match="adapter of org/bert; name that as base"):
        inspect_model(adapter, SOURCE, None)


def test_an_adapter_is_no_base(adapter: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"is an adapter .*only the models of a merge"):
        inspect_checkpoint(adapter, SOURCE)


def test_an_adapter_without_a_head_needs_a_base_with_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    edit_adapter(adapter, lambda tensors: {name: t for name, t in tensors.items() if "classifier" not in name})
    assert "neither it nor local:base has a head" in refusal(adapter, base).message
    info = inspect(adapter, tiny_checkpoint(tmp_path / "classifier", names=["bad", "good"]))
    assert task_of(info).label_ids == {"bad": 0, "good": 1}


def test_a_base_of_another_task_lends_no_head(adapter: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "tagger", labels=5)
    edit_json(base / "config.json", architectures=["BertForTokenClassification"])
    assert task_of(inspect(adapter, base)).outputs == 2
    edit_adapter(adapter, lambda tensors: {name: t for name, t in tensors.items() if "classifier" not in name})
    assert "has a head" in refusal(adapter, base).message


def test_a_base_of_another_family_has_none_of_the_targets(adapter: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "roberta", family=TINY_FAMILIES["roberta"])
    assert "not in the base" in refusal(adapter, base).message


def test_older_spellings_of_the_base_s_tensors_are_known(adapter: Path, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "old")
    edit_tensors(
        base, lambda tensors: {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
    )
    assert inspect(adapter, base).tensors["bert.encoder.layer.0.output.LayerNorm.weight"].shape == (16,)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_tied_matrices_of_language_models_are_not_adapted_apart(tmp_path: Path, module: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{module}.weight": torch.zeros(20, 8)}, adapter / "adapter_model.safetensors")
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **sizes))
        model.save_pretrained(tmp_path / str(tied))
    apart = inspect(adapter, tmp_path / "False")
    assert apart.tensors[f"{module}.weight"].path.parent == adapter
    assert apart.config == inspect_checkpoint(tmp_path / "False", "").config
    message = refusal(adapter, tmp_path / "True").message
    assert module in message
    assert "base" in message


def test_matrices_whose_names_end_alike_are_not_tied(tmp_path: Path) -> None:
    """GPT-2 ties `wte`; what it knows of positions is another matrix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    adapter, base = tmp_path / "adapter", tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=6, n_embd=8, n_layer=1, n_head=2)).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights["transformer.position_embeddings.weight"] = weights.pop("transformer.wpe.weight")
    save_file(weights, base / "model.safetensors")
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "transformer.position_embeddings.weight"
    save_file({f"base_model.model.{name}": torch.zeros(6, 8)}, adapter / "adapter_model.safetensors")
    assert inspect(adapter, base).tensors[name].path.parent == adapter


def test_adapters_are_read_under_the_name_of_their_class_s_prefix(adapter: Path, base: Path) -> None:
    """The base is published without `bert.`; the adapter's names have it."""
    assert all(name.startswith(("bert.", "classifier.")) for name in inspect(adapter, base).tensors)
    assert not any(name.startswith("bert.") for name in inspect_checkpoint(base, "").tensors)
    assert TINY_BERT.model_type == inspect(adapter, base).model_type
