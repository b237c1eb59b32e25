"""What a job publishes is loaded anew before it is published, and what does not load is not published."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Tensors, edit_json, edit_tensors, merge_spec, model_spec, silent, tiny_checkpoint
from tests.tiny_families import TINY_BERT, TINY_VISION, TinyFamily
from tests.tiny_language_models import GPT2, LLAMA, MASKED_BERT, QWEN2, T5, TinyModel, tiny_model
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.primitives.errors import EngineError, InvalidCheckpoint, NumericalError, StorageError
from worker.engine.checkpoints import reloading
from worker.engine.checkpoints.configurations import library_config
from worker.engine.checkpoints.layout import library_class
from worker.engine.jobs.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(torch.device("cpu"))


def merged(engine: Engine, out: Path, folders: Sequence[Path], **output: Any) -> MergeResult:
    return engine.merge(merge_spec(out, [model_spec(path) for path in folders], {"name": "linear"}, **output), silent)


def pair(tmp_path: Path, model: TinyModel = LLAMA, **settings: Any) -> list[Path]:
    return [tiny_model(tmp_path / name, model, seed=seed, **settings) for seed, name in enumerate("ab", 1)]


def refused(engine: Engine, tmp_path: Path, folders: Sequence[Path]) -> EngineError:
    """What the job fails with; then there is no manifest, without which nothing is published."""
    with pytest.raises(EngineError) as caught:
        merged(engine, tmp_path / "out", folders)
    assert not (tmp_path / "out" / "manifest.json").exists()
    return caught.value


@pytest.mark.parametrize("model", [LLAMA, QWEN2, GPT2, T5, MASKED_BERT], ids=lambda model: model.model_type)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merges_that_load_are_published_without_a_note(
    engine: Engine, tmp_path: Path, model: TinyModel, dtype: str
) -> None:
    assert merged(engine, tmp_path / "out", pair(tmp_path, model), dtype=dtype).notes == []
    assert (tmp_path / "out" / "manifest.json").exists()


def test_of_models_that_keep_their_heads_all_are_checked_and_the_first_is_run(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, list[str]] = {"check_layout": [], "_run": []}

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(reloading, name)

        def count(info: Any, *rest: Any) -> Any:
            called[name].append(info.path.name)
            return function(info, *rest)

        return count

    for name in called:
        monkeypatch.setattr(reloading, name, counted(name))
    folders = [tiny_checkpoint(tmp_path / name, seed=seed, labels=seed + 1) for seed, name in enumerate("ab", 1)]
    assert merged(engine, tmp_path / "out", folders).notes == []
    planned, published = called["check_layout"][:2], called["check_layout"][2:]
    assert all(name.startswith("maskmerge-described-") for name in planned)
    assert (published, called["_run"]) == (["a", "b"], ["a"])


def flip(file: Path, position: int) -> None:
    """Change the byte at a position of a file, which ends at -1."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a value of the head": (
        lambda models: flip(models / "a/model-00002-of-00002.safetensors", -1),
        "models/a/model-00002-of-00002.safetensors is not what was merged: the file has other values of tensor ",
    ),
    "metadata": (
        lambda models: flip(models / "a/model-00001-of-00002.safetensors", 28),
        "models/a/model-00001-of-00002.safetensors is not what was merged: the file has another header",
    ),
    "an end": (
        lambda models: os.truncate(models / "b/model-00002-of-00002.safetensors", 100),
        "models/b/model-00002-of-00002.safetensors is not what was merged: the file has another size",
    ),
    "a file": (
        lambda models: (models / "b/model-00002-of-00002.safetensors").unlink(),
        "models/b/model-00002-of-00002.safetensors cannot be read back after it was written: No such file",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_change_after_they_were_written_are_not_published(engine: Engine, tmp_path: Path, case: str) -> None:
    damage, problem = DAMAGE[case]
    folders = [tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)]
    spec = merge_spec(tmp_path / "out", [model_spec(path) for path in folders], {"name": "linear"})
    base = CheckpointSpec(source="local:base", path=tiny_checkpoint(tmp_path / "base", seed=3))
    spec = spec.model_copy(update={"base": base})
    damaged: list[str] = []

    def on_progress(phase: str, *_: object) -> None:
        if phase == "comparing" and not damaged:
            damage(tmp_path / "out" / "models")
            damaged.append(phase)

    with pytest.raises(StorageError) as caught:
        engine.merge(spec, on_progress)
    assert caught.value.message.startswith(problem)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_model_with_other_outputs_than_its_tensors_is_not_published(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the library read something else from the folder."""
    load = reloading._model

    def with_another_bias(*given: Any) -> Any:
        model, problems = load(*given)
        with torch.no_grad():
            model.classifier.bias += 1e-6
        return model, problems

    monkeypatch.setattr(reloading, "_model", with_another_bias)
    error = refused(engine, tmp_path, [tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate("ab")])
    assert isinstance(error, NumericalError)
    assert "gives other logits of a text or an image than its tensors" in error.message


def an_added_token_without_an_id(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"x": {"content": "y"}})


def a_matrix_of_more_rows(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=100)


def a_setting_that_one_class_refuses(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), "tokenizer_class": "BertTokenizer", "do_lower_case": None}
    file.write_text(json.dumps(content))


def a_key_that_is_a_method(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", add_special_tokens=True)


def a_tokenizer_of_no_class(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (a_matrix_of_more_rows, r"shape \[128, 16\]"),
        (a_tokenizer_of_no_class, r"tokenizer\.json"),
        (an_added_token_without_an_id, r"tokenizer_config\.json has added_tokens_decoder with 'x'.*anew"),
        (
            a_key_that_is_a_method,
            r"tokenizer_config\.json has add_special_tokens, which is a method of .*; remove the key",
        ),
        (a_setting_that_one_class_refuses, r"its tokenizer does not load \(tokenizer\.json, .*\): .*save it anew"),
    ],
)
def test_what_does_not_load_is_not_published(
    engine: Engine, tmp_path: Path, edit: Callable[[Path], None], problem: str
) -> None:
    folders = pair(tmp_path)
    for folder in folders:
        edit(folder)
    error = refused(engine, tmp_path, folders)
    assert isinstance(error, InvalidCheckpoint)
    assert error.message.startswith("checkpoint local:a: ")
    assert re.search(problem, error.message)


def test_what_only_the_models_class_tells_is_refused_before_the_merge(engine: Engine, tmp_path: Path) -> None:
    folders = pair(tmp_path)
    for folder in folders:
        edit_json(folder / "config.json", attention_bias=True, mlp_bias=True)
    error = refused(engine, tmp_path, folders)
    assert error.message == (
        "checkpoint local:a: no tensor model.layers.0.mlp.down_proj.bias, which LlamaForCausalLM needs"
    )
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_tensor_that_no_model_has_is_missed(engine: Engine, tmp_path: Path) -> None:
    """Of an architecture whose tensors are rearranged while they are loaded, whose headers do not tell what lacks."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, **LLAMA.settings}
    folders = pair(tmp_path, TinyModel("MixtralForCausalLM", "mixtral", settings))
    assert merged(engine, tmp_path / "whole", folders).notes == []

    def remove(tensors: Tensors) -> None:
        del tensors["model.norm.weight"]

    for folder in folders:
        edit_tensors(folder, remove)
    error = refused(engine, tmp_path, folders)
    assert error.message == "checkpoint local:a: no tensor model.norm.weight, which MixtralForCausalLM needs"


def test_a_setting_that_transformers_saves_under_another_name_reaches_it(engine: Engine, tmp_path: Path) -> None:
    """Configurations of Qwen3-MoE call `num_experts` by that name, and their files call it `num_local_experts`."""
    settings = {**LLAMA.settings, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    folders = pair(tmp_path, TinyModel("Qwen3MoeForCausalLM", "qwen3_moe", settings))
    assert json.loads((folders[0] / "config.json").read_text())["num_local_experts"] == 4
    assert merged(engine, tmp_path / "out", folders).notes == []
    assert library_config(inspect_checkpoint(folders[0], "local:a").config, "local:a").num_experts == 4


def test_a_merge_whose_outputs_are_not_finite_is_not_published(engine: Engine, tmp_path: Path) -> None:
    """Two models whose weights balance each other, and whose averages do not."""
    folders = pair(tmp_path)

    def scale(tensors: Tensors, up: str, down: str) -> None:
        tensors[up] *= 1e30
        tensors[down] *= 1e-30

    mlp = "model.layers.0.mlp"
    edit_tensors(folders[0], lambda tensors: scale(tensors, f"{mlp}.up_proj.weight", f"{mlp}.down_proj.weight"))
    edit_tensors(folders[1], lambda tensors: scale(tensors, f"{mlp}.down_proj.weight", f"{mlp}.up_proj.weight"))
    error = refused(engine, tmp_path, folders)
    assert isinstance(error, NumericalError)
    assert "are not finite, though those of the models are" in error.message


def test_models_that_are_not_finite_themselves_may_be_merged(engine: Engine, tmp_path: Path) -> None:

    def scale(tensors: Tensors) -> None:
        for name in ("model.norm.weight", "lm_head.weight"):
            tensors[name] *= 1e30

    folders = pair(tmp_path)
    for folder in folders:
        edit_tensors(folder, scale)
    [note] = merged(engine, tmp_path / "out", folders).notes
    assert note == "the outputs of the published LlamaForCausalLM are not finite, nor those of the model"


HEADS = [
    *((TINY_BERT, task) for task in ("TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM")),
    *((family, "ImageClassification") for family in TINY_VISION.values()),
]


@pytest.mark.parametrize(("family", "task"), HEADS, ids=lambda value: getattr(value, "model_type", value))
def test_models_of_every_head_are_run(engine: Engine, tmp_path: Path, family: TinyFamily, task: str) -> None:
    """One that is not run has a note of it."""
    folders = [
        tiny_checkpoint(tmp_path / name, family=family, seed=seed, task=task) for seed, name in enumerate("ab", 1)
    ]
    assert merged(engine, tmp_path / "out", folders).notes == []


def test_a_model_that_takes_more_than_a_text_is_noted(engine: Engine, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": {**sizes, "vocab_size": 64}, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
    folders = pair(tmp_path, TinyModel("CLIPModel", "clip", {**parts, "projection_dim": 8}))
    [note] = merged(engine, tmp_path / "out", folders).notes
    assert note == "the published CLIPModel was loaded anew, but not run: it takes more than a text or an image"


def test_copies_that_come_out_untied_are_not_published(engine: Engine, tmp_path: Path) -> None:
    """The library ties them by default, and both models store the copy: a method that draws would part them."""
    folders = pair(tmp_path, QWEN2)

    def store(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    for folder in folders:
        edit_tensors(folder, store)
    spec = merge_spec(tmp_path / "out", [model_spec(path) for path in folders], {"name": "linear"})
    result = engine.merge(spec, silent)
    assert result.notes == []
    published = tmp_path / "out" / "model"
    info = inspect_checkpoint(published, "local:a")
    config = library_config(info.config, "local:a")
    model = library_class("Qwen2ForCausalLM").from_pretrained(published, config=config)
    reloading._check_tied(info, model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(
        InvalidCheckpoint, match=r"lm_head\.weight would be published with other values than model\.emb"
    ):
        reloading._check_tied(info, model)


def test_what_the_library_does_not_know_is_published_with_a_note(engine: Engine, tmp_path: Path) -> None:
    folders = pair(tmp_path)
    for folder in folders:
        edit_json(folder / "config.json", model_type="unheard_of", architectures=["UnheardOfForCausalLM"])
    [note] = merged(engine, tmp_path / "out", folders).notes
    assert note == "transformers has no class UnheardOfForCausalLM here: the published model was not loaded anew"


def test_a_tokenizer_with_ids_beyond_the_matrix_is_noted_first(engine: Engine, tmp_path: Path) -> None:
    folders = pair(tmp_path)
    for folder in folders:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append({**content["added_tokens"][0], "id": 128, "content": "<beyond>"})
        (folder / "tokenizer.json").write_text(json.dumps(content))
    [note] = merged(engine, tmp_path / "out", folders).notes
    assert note.startswith(
        "the tokenizer of local:a has ids up to 128, and its embedding matrix 128 rows: the published model cannot "
        "read tokens from 128 on"
    )


BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenizer_config.json, a role": ("tokenizer_config.json", {"pad_token": "<beyond>"}),
    "tokenizer_config.json, further tokens": ("tokenizer_config.json", {"additional_special_tokens": ["<beyond>"]}),
    "special_tokens_map.json": ("special_tokens_map.json", {"pad_token": "<beyond>"}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_ids_beyond_the_matrix_that_files_beside_tokenizer_json_give_are_noted_first(
    engine: Engine, tmp_path: Path, case: str
) -> None:
    name, content = BESIDE[case]
    folders = pair(tmp_path)
    last = inspect_checkpoint(folders[0], "local:a").last_token
    assert last is not None
    for index, folder in enumerate(folders, 1):
        shutil.rmtree(folder)
        tiny_model(folder, seed=index, vocab_size=last + 1)
        file = folder / name
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **content}))
    notes = merged(engine, tmp_path / "out", folders).notes
    assert notes[0].startswith(
        f"the tokenizer of local:a has ids up to {last + 1}, and its embedding matrix {last + 1} rows"
    )
    assert len([note for note in notes if "ids up to" in note]) == 1


GPTJ = TinyModel(
    "GPTJForCausalLM",
    "gptj",
    {"n_embd": 16, "n_head": 2, "rotary_dim": 8, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
    layers="n_layer",
)


def test_a_model_whose_tables_of_positions_are_huge_is_not_built(engine: Engine, tmp_path: Path) -> None:
    folders = pair(tmp_path, GPTJ)
    assert merged(engine, tmp_path / "small", folders).notes == []
    for folder in folders:
        edit_json(folder / "config.json", n_positions=16_000_000)
    rows, columns, layers = 16_000_000, 8, 2
    [note] = merged(engine, tmp_path / "out", folders).notes
    [size] = re.findall(r"not loaded anew: its tables of positions and the like have (\d+) bytes", note)
    assert int(size) >= layers * rows * columns * 4
