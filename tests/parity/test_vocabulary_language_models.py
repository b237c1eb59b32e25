"""Language models whose tokenizers differ, against a computation by token, dense and in float64."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from tests.tiny import Tensors, edit_json, edit_tensors, merge_spec, model_spec, read_model, silent
from tests.tiny_adapters import merged_by_peft, save_adapter
from tests.tiny_families import WORDS
from tests.tiny_language_models import (
    GPT2,
    LLAMA,
    MASKED_BERT,
    NEOX,
    QWEN2,
    T5,
    TinyModel,
    loaded_model,
    tiny_model,
    word_level_tokenizer,
)
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.jobs.engine import Engine

MARKS = ("<s>", "</s>", "<unk>")
WORDS_OF = {
    "base": WORDS[:40],
    "a": (*WORDS[:40], "red", "green"),
    "b": (*WORDS[30::-1], "blue", "green"),  # other ids
}
ROWS = {"base": 45, "a": 48, "b": 39}  # some with rows of no token
WEIGHTS = {"a": 1.0, "b": 3.0}
BY_TOKEN = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "qwen2": ("model.embed_tokens.weight",),
    "gpt2": ("transformer.wte.weight",),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "t5": ("shared.weight",),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
}


def tokens_of(name: str) -> list[str]:
    return [*MARKS, *WORDS_OF[name]]


def checkpoint(root: Path, name: str, model: TinyModel, **settings: Any) -> Path:
    seed = list(WORDS_OF).index(name)
    folder = tiny_model(root / name, model, seed=seed, vocab_size=ROWS[name], **settings)
    word_level_tokenizer(WORDS_OF[name]).save_pretrained(folder)
    return folder


def merged(folder: Path, models: Sequence[Path], policy: str, base: Path | None, method: Mapping[str, Any]) -> Path:
    specs = [model_spec(path, weight=WEIGHTS[path.name]) for path in models]
    spec = merge_spec(folder, specs, method, vocabulary=policy)
    if base is not None:
        spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    Engine().merge(spec, silent)
    return folder / "model"


def expected_tokens(policy: str, owner: str) -> list[str | None]:
    """By row of the output; None for rows of no token."""
    known: list[str | None] = [*tokens_of(owner)]
    known += [None] * (ROWS[owner] - len(known))
    for name in ("a", "b"):
        known += [token for token in tokens_of(name) if token not in known and policy == "union"]
    return known


def versions_by_token(
    states: Mapping[str, Tensor], tokens: Sequence[str | None], owner: str
) -> dict[str, list[Tensor]]:
    """Each model's rows, and the base's where there is one, by the documented rule."""
    found: dict[str, list[Tensor]] = {name: [] for name in states}
    for place, token in enumerate(tokens):
        own = {
            name: state[tokens_of(name).index(token)].double()
            for name, state in states.items()
            if token is not None and token in tokens_of(name)
        }
        if token is None:
            own = {owner: states[owner][place].double()}
        having = [row for name, row in own.items() if name != "base"]
        instead = own["base"] if "base" in own else torch.stack(having).mean(0)
        for name in states:
            found[name].append(own.get(name, instead))
    return found


def dense(versions: Mapping[str, Tensor]) -> Tensor:
    """The weighted average; with a base, task arithmetic of scale 0.7."""
    if "base" not in versions:
        return torch.stack([w * versions[name] for name, w in WEIGHTS.items()]).sum(0) / sum(WEIGHTS.values())
    deltas = torch.stack([w * (versions[name] - versions["base"]) for name, w in WEIGHTS.items()])
    return versions["base"] + 0.7 * deltas.sum(0)


def expected(states: Mapping[str, Tensors], model: TinyModel, policy: str, owner: str) -> dict[str, Tensor]:
    tokens = expected_tokens(policy, owner)
    wanted = {}
    for name in states["a"]:
        tensors = {of: state[name] for of, state in states.items()}
        if name in BY_TOKEN[model.model_type]:
            wanted[name] = dense({of: torch.stack(r) for of, r in versions_by_token(tensors, tokens, owner).items()})
        else:
            wanted[name] = dense({of: tensor.double() for of, tensor in tensors.items()})
    return wanted


@pytest.mark.parametrize("policy", ["base", "union"])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("model", [LLAMA, QWEN2, GPT2, NEOX, T5, MASKED_BERT], ids=lambda model: model.model_type)
def test_embeddings_and_heads_are_merged_by_token(tmp_path: Path, model: TinyModel, based: bool, policy: str) -> None:
    names = ["base", "a", "b"] if based else ["a", "b"]
    folders = {name: checkpoint(tmp_path, name, model) for name in names}
    states = {name: read_model(folder) for name, folder in folders.items()}
    wanted = expected(states, model, policy, names[0])
    # A stored copy of a tied matrix has the rows of its own model.
    copies = {copy: states["b"][of].clone() for copy, of in model.tied.items()}
    edit_tensors(folders["b"], lambda tensors: {**tensors, **copies})
    method = {"name": "task_arithmetic", "scale": 0.7} if based else {"name": "average"}
    out = merged(tmp_path / "out", [folders["a"], folders["b"]], policy, folders.get("base"), method)
    found = read_model(out)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    tokens = expected_tokens(policy, names[0])
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.get_vocab() == {token: place for place, token in enumerate(tokens) if token is not None}
    loaded = loaded_model(out, model.architecture)
    assert loaded.config.vocab_size == len(tokens)
    ids = torch.tensor([tokenizer.encode("three one green" if policy == "union" else "three one two").ids])
    inputs = {"decoder_input_ids": ids} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = loaded(input_ids=ids, **inputs).logits
    assert logits.shape == (1, 3, len(tokens))
    assert bool(logits.isfinite().all())


def test_the_output_ends_and_pads_as_the_owner_of_its_tokens_does(tmp_path: Path) -> None:
    """Instruction tuning changes these tokens; what is published must agree with the published tokenizer."""
    folders = [checkpoint(tmp_path, name, LLAMA) for name in ("a", "b")]
    own = {"eos_token_id": tokens_of("b").index("green"), "pad_token_id": 1}
    for file in ("config.json", "generation_config.json"):
        edit_json(folders[1] / file, **own)
    edit_json(folders[1] / "tokenizer_config.json", eos_token="green", pad_token="</s>")
    edit_json(folders[0] / "tokenizer_config.json", pad_token="<unk>")
    for folder in folders:
        (folder / "chat_template.jinja").write_text(f"{{# {folder.name} #}}")
        (folder / "tokenizer.model").write_bytes(b"pieces without the new tokens")
    out = merged(tmp_path / "out", folders, "union", None, {"name": "average"})
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text())["eos_token_id"] == 1
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert (out / "chat_template.jinja").read_text() == "{# a #}"
    assert not (out / "tokenizer.model").exists()
    out = merged(tmp_path / "reversed", folders[::-1], "base", None, {"name": "average"})
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == own["eos_token_id"]
    assert (out / "chat_template.jinja").read_text() == "{# b #}"
    assert (out / "tokenizer.model").exists()


@pytest.mark.parametrize("policy", ["base", "union"])
def test_an_adapter_of_embeddings_is_merged_by_its_own_tokens(tmp_path: Path, policy: str) -> None:
    """Beside a whole model with others; the adapter brings a tokenizer with tokens for the base's last rows."""
    base = checkpoint(tmp_path, "base", LLAMA, tie_word_embeddings=False)
    edit_json(base / "config.json", tie_word_embeddings=False)
    whole = checkpoint(tmp_path, "b", LLAMA, tie_word_embeddings=False)
    adapter = tmp_path / "a"
    targets = ["q_proj", "embed_tokens", "lm_head"]
    save_adapter(loaded_model(base, LLAMA.architecture, torch.float32), adapter, 1, target_modules=targets)
    word_level_tokenizer(WORDS_OF["a"]).save_pretrained(adapter)
    by_peft = merged_by_peft(loaded_model(base, LLAMA.architecture, torch.float32), adapter).state_dict()
    states = {"base": read_model(base), "a": by_peft, "b": read_model(whole)}
    tokens = expected_tokens(policy, "base")
    method = {"name": "task_arithmetic", "scale": 0.7}
    out = merged(tmp_path / "out", [adapter, whole], policy, base, method)
    found = read_model(out)
    for name in states["b"]:
        tensors = {of: state[name] for of, state in states.items()}
        if name in BY_TOKEN["llama"]:
            tensors = {of: torch.stack(rows) for of, rows in versions_by_token(tensors, tokens, "base").items()}
        wanted = dense({of: tensor.double() for of, tensor in tensors.items()})
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-5, msg=name)
    assert ("red" in AutoTokenizer.from_pretrained(out).get_vocab()) is (policy == "union")


def test_an_adapter_without_tokenizer_has_its_bases(tmp_path: Path) -> None:
    base, whole = (checkpoint(tmp_path, name, LLAMA, tie_word_embeddings=False) for name in ("base", "b"))
    adapter = tmp_path / "a"
    save_adapter(loaded_model(base, LLAMA.architecture, torch.float32), adapter, 1, target_modules=["q_proj"])
    method = {"name": "task_arithmetic", "scale": 0.7}
    without = read_model(merged(tmp_path / "without", [adapter, whole], "union", base, method))
    shutil.copy(base / "tokenizer.json", adapter)
    assert all(
        torch.equal(tensor, without[name])
        for name, tensor in read_model(merged(tmp_path / "with", [adapter, whole], "union", base, method)).items()
    )
