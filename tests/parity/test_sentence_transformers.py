"""Merges of embedding models: what the library sentence-transformers makes of what is published."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import edit_json, merge_spec, model_spec, read_model, silent, tiny_base
from tests.tiny_embeddings import embedding_model
from tests.tiny_families import TINY_BERT
from worker.engine.catalog.contracts.report import MergeResult
from worker.engine.catalog.contracts.spec import CheckpointSpec
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.jobs.engine import Engine

WEIGHTS = (1.0, 3.0)
TEXTS = ["one two three", "green", "six one red blue two", "four four"]
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(torch.device("cpu"))


def embeddings(folder: Path) -> Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    found: Tensor = model.encode(TEXTS, convert_to_tensor=True)
    return found


def averaged(folders: Sequence[Path], out: Path) -> Path:
    """The first model's folder, with averages of all tensors that any of its files has."""
    import shutil

    shutil.copytree(folders[0], out)
    for file in out.rglob("*.safetensors"):
        states = [load_file(folder / file.relative_to(out)) for folder in folders]
        total = sum(WEIGHTS)
        mean = {
            name: torch.stack([w * state[name].double() for w, state in zip(WEIGHTS, states, strict=True)]).sum(0)
            / total
            for name in states[0]
        }
        save_file({name: tensor.float() for name, tensor in mean.items()}, file, {"format": "pt"})
    return out


def merged(engine: Engine, out: Path, folders: Sequence[Path], method: str = "linear", **output: Any) -> MergeResult:
    specs = [model_spec(path, weight=weight) for path, weight in zip(folders, WEIGHTS, strict=False)]
    return engine.merge(merge_spec(out, specs, {"name": method}, **output), silent)


@pytest.mark.parametrize(
    ("pooling", "more"),
    [
        ("cls", ("normalize",)),
        ("mean", ()),
        ("max+mean", ("dense", "layer norm", "normalize")),
        ("lasttoken", ("residual",)),
        ("weightedmean", ("dense", "normalize")),
    ],
)
def test_embeddings_are_those_of_averaged_weights_with_the_models_modules(
    engine: Engine, tmp_path: Path, pooling: str, more: tuple[str, ...]
) -> None:
    folders = [embedding_model(tmp_path / name, seed, pooling, *more) for seed, name in enumerate("ab", 1)]
    result = merged(engine, tmp_path / "out", folders)
    assert result.notes == []
    found = embeddings(tmp_path / "out" / "model")
    torch.testing.assert_close(found, embeddings(averaged(folders, tmp_path / "expected")), rtol=1e-4, atol=1e-5)
    if "normalize" in more:
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert "model/1_Pooling/config.json" in {file["name"] for file in manifest}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert 'SentenceTransformer("model")' in card


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "passthrough"])
def test_weights_of_modules_are_averaged_whatever_the_method(engine: Engine, tmp_path: Path, method: str) -> None:
    """Also where the base, which is no embedding model, has none."""
    folders = [embedding_model(tmp_path / name, seed, "mean", "dense") for seed, name in enumerate("ab", 1)]
    asked: dict[str, Any] = {"name": method}
    if method == "passthrough":
        asked["slices"] = [{"model": "a", "layers": [0, 1]}, {"model": "b", "layers": [0, 2]}]
    specs = [model_spec(path, weight=weight) for path, weight in zip(folders, WEIGHTS, strict=True)]
    spec = merge_spec(tmp_path / "out", specs, asked)
    if method in ("task_arithmetic", "ties"):
        base = tiny_base(tmp_path / "base")
        TINY_BERT.tokenizer().save_pretrained(base)
        spec = spec.model_copy(update={"base": CheckpointSpec(source="local:base", path=base)})
    engine.merge(spec, silent)
    found = load_file(tmp_path / "out" / "model" / "2_Dense" / "model.safetensors")
    states = [load_file(folder / "2_Dense" / "model.safetensors") for folder in folders]
    weights = (0.0, 1.0) if method == "passthrough" else (0.25, 0.75)  # what follows the layers is of the last slice
    for name, tensor in found.items():
        wanted = sum(weight * state[name] for weight, state in zip(weights, states, strict=True))
        torch.testing.assert_close(tensor, wanted)
    assert embeddings(tmp_path / "out" / "model").shape == (len(TEXTS), 8)


def test_the_dtype_of_the_output_is_that_of_its_modules_too(engine: Engine, tmp_path: Path) -> None:
    folders = [embedding_model(tmp_path / name, seed, "mean", "dense") for seed, name in enumerate("ab", 1)]
    merged(engine, tmp_path / "out", folders, dtype="float16")
    found = load_file(tmp_path / "out" / "model" / "2_Dense" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def pool_otherwise(folder: Path) -> None:
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode="mean")


def without_normalize(folder: Path) -> None:
    entries = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(entries[:-1]))


def in_lower_case(folder: Path) -> None:
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (pool_otherwise, r"pooling_mode of Pooling \(1_Pooling/config.json\) differs: \['cls'\], \['mean'\]"),
        (without_normalize, "lists other modules: Pooling, Normalize; Pooling"),
        (in_lower_case, r"do_lower_case of their transformers .* differs: False, True"),
    ],
)
def test_embedding_models_that_do_other_things_with_the_output_are_refused(
    engine: Engine, tmp_path: Path, edit: Edit, problem: str
) -> None:
    folders = [embedding_model(tmp_path / name, seed, "cls", "normalize") for seed, name in enumerate("ab", 1)]
    edit(folders[1])
    with pytest.raises(IncompatibleCheckpoints, match=problem) as caught:
        merged(engine, tmp_path / "out", folders)
    assert (caught.value.detail["first"], caught.value.detail["second"]) == ("local:a", "local:b")


def test_older_spellings_of_the_same_modules_agree(engine: Engine, tmp_path: Path) -> None:
    folders = [embedding_model(tmp_path / name, seed, "cls", "normalize") for seed, name in enumerate("ab", 1)]
    older = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folders[1] / "1_Pooling" / "config.json").write_text(json.dumps(older))
    (folders[1] / "2_Normalize" / "config.json").unlink()  # as git keeps no empty folders
    entries = json.loads((folders[1] / "modules.json").read_text())
    for entry, kind in zip(entries, ("Transformer", "Pooling", "Normalize"), strict=True):
        entry["type"] = f"sentence_transformers.models.{kind}"
    (folders[1] / "modules.json").write_text(json.dumps(entries))
    (folders[1] / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    result = merged(engine, tmp_path / "out", folders)
    assert result.notes == ["max_seq_length of local:b differ from what is published, local:a's"]
    wanted = embeddings(averaged(folders, tmp_path / "expected"))
    torch.testing.assert_close(embeddings(tmp_path / "out" / "model"), wanted, rtol=1e-4, atol=1e-5)
    reverse = merged(engine, tmp_path / "reversed", folders[::-1])
    assert reverse.notes == ["max_seq_length of local:a differ from what is published, local:b's"]
    published = tmp_path / "reversed" / "model"
    assert json.loads((published / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 20, "do_lower_case": False,
    }  # fmt: skip
    torch.testing.assert_close(embeddings(published).norm(dim=1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize(("limits", "differ"), [((20, 30), True), ((30, 30), False), ((100, 10**30), False)], ids=str)
def test_lengths_that_only_tokenizers_have_are_compared(
    engine: Engine, tmp_path: Path, limits: tuple[int, int], differ: bool
) -> None:
    """As sentence-transformers finds them: the tokenizer's, or the model's number of positions if that is less."""
    from sentence_transformers import SentenceTransformer

    folders = [embedding_model(tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    for folder, limit in zip(folders, limits, strict=True):
        edit_json(folder / "tokenizer_config.json", model_max_length=limit)
    result = merged(engine, tmp_path / "out", folders)
    assert result.notes == (["max_seq_length of local:b differ from what is published, local:a's"] if differ else [])
    read = [SentenceTransformer(str(folder), device="cpu").max_seq_length for folder in folders]
    assert (read[0] != read[1]) == differ
    assert SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu").max_seq_length == read[0]


def test_prompts_are_the_first_models_and_that_they_differ_is_noted(engine: Engine, tmp_path: Path) -> None:
    prompts = [{"query": f"{name}: "} for name in "ab"]
    folders = [
        embedding_model(tmp_path / name, seed, prompts=given)
        for seed, (name, given) in enumerate(zip("ab", prompts, strict=True), 1)
    ]
    result = merged(engine, tmp_path / "out", folders)
    assert result.notes == ["prompts of local:b differ from what is published, local:a's"]
    from sentence_transformers import SentenceTransformer

    assert SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu").prompts["query"] == "a: "


def test_a_model_without_modules_has_no_opinion_which_is_noted(engine: Engine, tmp_path: Path) -> None:
    plain = tiny_base(tmp_path / "a", base_seed=1)
    TINY_BERT.tokenizer().save_pretrained(plain)
    other = embedding_model(tmp_path / "b", 2, "cls", "normalize")
    result = merged(engine, tmp_path / "out", [plain, other])
    assert result.notes[0] == "local:a: no modules.json is there; the merge has the modules of local:b"
    torch.testing.assert_close(embeddings(tmp_path / "out" / "model").norm(dim=1), torch.ones(len(TEXTS)))
    other = embedding_model(tmp_path / "c", 2, "cls", "dense")
    with pytest.raises(
        IncompatibleCheckpoints, match="2_Dense of the first has weights, and the second has no modules"
    ):
        merged(engine, tmp_path / "refused", [plain, other])


@pytest.mark.parametrize("kind", ["custom_st.Transformer", "sentence_transformers.models.LSTM"])
def test_modules_that_are_not_available_are_left_out_and_a_note_leads(
    engine: Engine, tmp_path: Path, kind: str
) -> None:
    folders = [embedding_model(tmp_path / name, seed, "cls", "normalize") for seed, name in enumerate("ab", 1)]
    entries = json.loads((folders[1] / "modules.json").read_text())
    entries[0 if "custom" in kind else 2]["type"] = kind
    (folders[1] / "modules.json").write_text(json.dumps(entries))
    result = merged(engine, tmp_path / "out", folders)
    assert f"local:b is a folder of sentence-transformers with a module of class {kind}" in result.notes[0]
    assert "published without modules.json" in result.notes[0]
    assert not (tmp_path / "out" / "model" / "modules.json").exists()
    assert read_model(tmp_path / "out" / "model")


def set_path(folder: Path, path: str) -> None:
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(entries))


def in_a_folder_of_its_own(folder: Path) -> None:
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(entries))


def only_pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def of_another_width(folder: Path) -> None:
    edit_json(folder / "2_Dense" / "config.json", out_features=9)


def of_its_own_activation(folder: Path) -> None:
    edit_json(folder / "2_Dense" / "config.json", activation_function="os.system")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda folder: set_path(folder, "../1_Pooling"), "names the folder '../1_Pooling'"),
        (lambda folder: set_path(folder, "/etc"), "names the folder '/etc'"),
        (lambda folder: set_path(folder, "3_Missing"), "3_Missing/config.json is missing"),
        (lambda folder: set_path(folder, "2_Dense"), "names one folder for two modules"),
        (in_a_folder_of_its_own, "its transformer lies in the folder '0_Transformer', as old versions had it; save"),
        (only_pickled, "2_Dense/model.safetensors is missing, and pickle files are not opened; save it anew"),
        (
            of_another_width,
            r"has linear.bias \[8\], linear.weight \[8, 16\]; by its config.json it would have linear.bias \[9\]",
        ),
        (of_its_own_activation, "activation_function that is none of torch"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "modules.json is not a JSON list of modules"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "an entry without a path and a type"),
        (lambda folder: (folder / "modules.json").write_text("[" * 10**5), "cannot be read as JSON"),
    ],
)
def test_modules_that_are_none_are_refused_by_name(engine: Engine, tmp_path: Path, edit: Edit, problem: str) -> None:
    folders = [embedding_model(tmp_path / name, seed, "cls", "dense") for seed, name in enumerate("ab", 1)]
    edit(folders[1])
    with pytest.raises(InvalidCheckpoint, match=problem):
        merged(engine, tmp_path / "out", folders)
