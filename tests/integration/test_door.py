"""No key of a checkpoint's configurations makes a library open another file, or load the model in another way."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.inotify import opened
from tests.tiny import edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.files import INDEX, WEIGHTS
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.models.loading import LoadedModel, load

CPU = torch.device("cpu")
TEXT = "one two three"
SHARD = "elsewhere.safetensors"


@dataclass(frozen=True)
class Trap:
    """A checkpoint beside files that must not be opened, in its folder, in a sub-folder, and outside every root."""

    checkpoint: Path
    files: list[Path]


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    checkpoint = tiny_checkpoint(tmp_path / "root" / "expert")
    outside = tmp_path / "outside"
    outside.mkdir()
    (checkpoint / "inner").mkdir()
    files = []
    for folder in (checkpoint, checkpoint / "inner", outside):
        weights = {name: torch.full_like(tensor, 0.5) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
        save_file(weights, folder / SHARD, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, str(outside / SHARD))}
        (folder / "other.index.json").write_text(json.dumps(index))
        (folder / "other.safetensors.index.json").write_text(json.dumps(index))
        (folder / "adapter_model.bin").write_bytes(b"a pickle")
        for name in ("other.json", "other.txt", "other.model", "tokenizer.5.0.0.json"):
            (folder / name).write_text((checkpoint / "tokenizer.json").read_text())
        files += [
            file for file in folder.iterdir() if file.name.startswith(("other", "elsewhere", "adapter", "tokenizer.5"))
        ]
    (checkpoint / "inner" / "link.safetensors").symlink_to(outside / SHARD)
    return Trap(checkpoint, files)


def places(trap: Trap, name: str) -> Iterator[str]:
    """Ways to spell a file of this name in each of the folders."""
    outside = trap.checkpoint.parent.parent / "outside"
    yield from (name, f"inner/{name}", f"../../outside/{name}", str(outside / name), f"inner/../{name}", f"./{name}")


def weights_keys(trap: Trap) -> Iterator[dict[str, Any]]:
    for name in (SHARD, "other.safetensors.index.json", "adapter_model.bin", "link.safetensors"):
        for place in places(trap, name):
            yield {"transformers_weights": place}
            yield {"text_config": {"transformers_weights": place}, "_name_or_path": place}


def tokenizer_keys(trap: Trap) -> Iterator[dict[str, Any]]:
    keys = ("vocab_file", "tokenizer_file", "merges_file", "spm_file", "vocab", "name_or_path", "chat_template_file")
    for key, place in product(keys, places(trap, "other.json")):
        yield {key: place}
    for place in places(trap, "other.model"):
        yield {"sp_model_kwargs": {"model_file": place}, "init_inputs": [place]}
        yield {"tokenizer_class": "XLMRobertaTokenizer", "vocab_file": place}
    yield {"fast_tokenizer_files": ["tokenizer.5.0.0.json", "tokenizer.json"]}
    yield {"fast_tokenizer_files": ["inner/tokenizer.5.0.0.json"]}


def special_tokens(trap: Trap) -> Iterator[dict[str, Any]]:
    for key, place in product(("vocab_file", "tokenizer_file", "merges_file", "vocab"), places(trap, "other.txt")):
        yield {key: place, "pad_token": "[PAD]"}


CONFIGURATIONS: dict[str, Callable[[Trap], Iterator[dict[str, Any]]]] = {
    "config.json": weights_keys,
    "tokenizer_config.json": tokenizer_keys,
    "special_tokens_map.json": special_tokens,
}


def loaded(checkpoint: Path) -> LoadedModel:
    with Views() as views:
        view = views.open(checkpoint, "local:expert", checkpoint.parent)
        return load(inspect_checkpoint(view, "local:expert"), CPU)


def logits(model: LoadedModel) -> torch.Tensor:
    encoded = model.tokenizer([TEXT], return_tensors="pt")
    answer: torch.Tensor = model.model(**encoded).logits
    return answer


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_configuration_makes_a_library_open_another_file(trap: Trap, name: str) -> None:
    file = trap.checkpoint / name
    before = file.read_text() if file.exists() else "{}"
    expected = logits(loaded(trap.checkpoint))
    tried = 0
    for keys in CONFIGURATIONS[name](trap):
        file.write_text(json.dumps({**json.loads(before), **keys}))
        with opened(trap.files) as found:
            try:
                answer = logits(loaded(trap.checkpoint))
            except InvalidCheckpoint:
                answer = expected
        assert not found, keys
        assert answer.equal(expected), keys
        tried += 1
    assert tried >= 24


STEERING: dict[str, dict[str, Any]] = {
    "an attention that is not installed": {"_attn_implementation": "flash_attention_2"},
    "its public name": {"attn_implementation": "flash_attention_2"},
    "its internal name": {"_attn_implementation_internal": "flash_attention_3"},
    "kernels of the hub": {"attn_implementation": "kernels-community/flash-attn", "use_kernels": True},
    "experts": {"experts_implementation": "grouped_mm"},
    "a quantisation that is not there": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "recomputed activations": {"gradient_checkpointing": True},
    "outputs": {
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": False,
        "use_return_dict": False,
    },
    "a feed-forward in chunks": {"chunk_size_feed_forward": 2},
    "tracing": {"torchscript": True},
    "pruned heads": {"pruned_heads": {"0": [0, 1]}},
    "plans for several devices": {"base_model_tp_plan": {"layers": "x"}, "tp_plan": "auto", "device_map": "auto"},
}


@pytest.mark.parametrize("case", STEERING)
def test_keys_that_steer_loading_change_nothing(tmp_path: Path, case: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "expert")
    expected = logits(loaded(checkpoint))
    edit_json(checkpoint / "config.json", **STEERING[case])
    model = loaded(checkpoint)
    assert logits(model).equal(expected)
    network: Any = model.model
    assert network.config._attn_implementation == "maskmerge_cpu"
    assert not network.is_activation_checkpointing


CLAIMS: dict[str, dict[str, Any]] = {
    "segments": {"type_vocab_size": 20_000_000},
    "positions": {"max_position_embeddings": 2**31},
    "a vocabulary": {"vocab_size": 10**9},
    "neurons": {"intermediate_size": 10**9},
    "labels": {"num_labels": 10**8, "id2label": None},
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_size_that_the_headers_do_not_show_is_refused_before_a_model_is_built(tmp_path: Path, case: str) -> None:
    import resource

    checkpoint = tiny_checkpoint(tmp_path / "expert")
    loaded(checkpoint)  # with all that it imports
    edit_json(checkpoint / "config.json", **CLAIMS[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidCheckpoint):
        loaded(checkpoint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_an_index_beside_one_file_is_not_read_by_anyone(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "expert")
    expected = logits(loaded(checkpoint))
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    save_file(other, checkpoint / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (checkpoint / INDEX).write_text(json.dumps(index))
    with opened([checkpoint / "model-00001-of-00001.safetensors", checkpoint / INDEX]) as found:
        assert logits(loaded(checkpoint)).equal(expected)
    assert not found
