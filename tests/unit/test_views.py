"""The door for checkpoints: what a view holds, and that nothing put in a file's place later is read."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.tiny import edit_json, tiny_checkpoint, write_rows
from worker.engine.catalog.checkpoints.files import INDEX, WEIGHTS
from worker.engine.catalog.checkpoints.inspection import checkpoint_state, inspect_checkpoint
from worker.engine.catalog.checkpoints.limits import MAX_DESCRIPTION_BYTES, MAX_TOKENIZER_BYTES
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset
from worker.engine.checkpoints.reader import TensorReader

SOURCE = "local:expert"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "root" / "expert")


@pytest.fixture
def views() -> Iterator[Views]:
    with Views() as opened:
        yield opened


def view_of(views: Views, checkpoint: Path) -> Path:
    return views.open(checkpoint, SOURCE, checkpoint.parent)


def test_a_view_describes_what_the_folder_describes(checkpoint: Path, views: Views) -> None:
    direct, seen = inspect_checkpoint(checkpoint, SOURCE), inspect_checkpoint(view_of(views, checkpoint), SOURCE)
    assert seen.config == direct.config
    assert seen.vocabulary == direct.vocabulary
    assert {n: (t.dtype, t.shape, t.offset) for n, t in seen.tensors.items()} == {
        n: (t.dtype, t.shape, t.offset) for n, t in direct.tensors.items()
    }
    assert checkpoint_state(seen) == checkpoint_state(direct)


def test_a_view_has_no_file_that_makes_no_checkpoint(checkpoint: Path, views: Views) -> None:
    for name in ("NOTES.md", "training_args.bin", "other.safetensors", "model.fp16.safetensors", "code.py"):
        (checkpoint / name).write_text("x")
    names = {file.name for file in view_of(views, checkpoint).iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def test_views_in_a_folder_are_left_to_its_owner(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    with Views(folder) as opened:
        view = view_of(opened, checkpoint)
    assert (view.parent, (view / "config.json").is_file()) == (folder, True)


def test_views_are_gone_with_their_context(checkpoint: Path) -> None:
    with Views() as opened:
        view = view_of(opened, checkpoint)
        descriptors = len(os.listdir("/proc/self/fd"))
    assert not view.exists()
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_what_is_put_in_the_place_of_a_file_later_is_not_read(checkpoint: Path, tmp_path: Path, views: Views) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    view = view_of(views, checkpoint)
    info = inspect_checkpoint(view, SOURCE)
    with TensorReader() as reader:
        expected = {name: reader.read(tensor) for name, tensor in info.tensors.items()}
    for file in list(checkpoint.iterdir()):
        file.unlink()
        file.symlink_to(other / file.name)
    again = inspect_checkpoint(view, SOURCE)
    assert again.config == info.config
    with TensorReader() as reader:
        assert all(reader.read(tensor).equal(expected[name]) for name, tensor in again.tensors.items())


def link_out(checkpoint: Path, name: str, target: Path) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special_tokens_map.json", WEIGHTS])
def test_a_link_out_of_the_root_is_refused_by_name(checkpoint: Path, tmp_path: Path, views: Views, name: str) -> None:
    outside = tmp_path / "outside"
    (checkpoint / name).rename(outside) if (checkpoint / name).exists() else outside.write_text("{}")
    link_out(checkpoint, name, outside)
    with pytest.raises(InvalidCheckpoint, match=rf"{name} is a symbolic link out"):
        view_of(views, checkpoint)
    link_out(checkpoint, name, Path("../../outside"))
    with pytest.raises(InvalidCheckpoint, match=rf"{name} is a symbolic link out"):
        view_of(views, checkpoint)


def test_a_link_out_by_a_folder_on_the_way_is_refused(checkpoint: Path, tmp_path: Path, views: Views) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "shard").write_text("{}")
    (checkpoint.parent / "inside").symlink_to(tmp_path / "outside")
    link_out(checkpoint, "config.json", Path("../inside/shard"))
    with pytest.raises(InvalidCheckpoint, match=r"config\.json is a symbolic link out"):
        view_of(views, checkpoint)


def test_a_link_out_in_a_module_s_folder_is_refused(checkpoint: Path, tmp_path: Path, views: Views) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "modules.json").write_text("[]")
    link_out(checkpoint / "1_Pooling", "config.json", tmp_path / "secret.json")
    with pytest.raises(InvalidCheckpoint, match=r"1_Pooling/config\.json is a symbolic link out"):
        view_of(views, checkpoint)


def test_links_within_the_root_are_read(checkpoint: Path, views: Views) -> None:
    (checkpoint.parent / "blobs").mkdir()
    expected = inspect_checkpoint(checkpoint, SOURCE)
    for name in (WEIGHTS, "config.json"):  # as the hub's cache stores them
        (checkpoint / name).rename(checkpoint.parent / "blobs" / name)
        link_out(checkpoint, name, Path("../blobs") / name)
    seen = inspect_checkpoint(view_of(views, checkpoint), SOURCE)
    assert seen.config == expected.config
    assert seen.tensors.keys() == expected.tensors.keys()


def test_a_link_that_leads_nowhere_is_as_if_it_were_not_there(checkpoint: Path, views: Views) -> None:
    save_file_as_shard(checkpoint)
    link_out(checkpoint, WEIGHTS, Path("gone"))
    assert {tensor.file for tensor in inspect_checkpoint(view_of(views, checkpoint), SOURCE).tensors.values()} == {
        "one.safetensors"
    }


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "one.safetensors", "tokenizer.json"])
def test_a_link_to_an_annexed_file_that_was_not_fetched_is_named_as_one(
    checkpoint: Path, views: Views, name: str
) -> None:
    if name == "one.safetensors":
        save_file_as_shard(checkpoint)
    target = Path("../.git/annex/objects/w8/pv/SHA256E-s313--f50d/SHA256E-s313--f50d")
    link_out(checkpoint, name, target)
    with pytest.raises(InvalidCheckpoint, match=rf"{name} is not there: a git-annex pointer .* `git annex get`"):
        view_of(views, checkpoint)


def test_a_link_to_an_annexed_file_that_was_fetched_is_read(checkpoint: Path, views: Views) -> None:
    expected = inspect_checkpoint(checkpoint, SOURCE)
    target = checkpoint.parent / ".git" / "annex" / "objects" / "SHA256E-s313--f50d"
    target.parent.mkdir(parents=True)
    (checkpoint / WEIGHTS).rename(target)
    link_out(checkpoint, WEIGHTS, Path("../.git/annex/objects") / target.name)
    assert inspect_checkpoint(view_of(views, checkpoint), SOURCE).tensors.keys() == expected.tensors.keys()


def save_file_as_shard(checkpoint: Path) -> None:
    names = list(inspect_checkpoint(checkpoint, SOURCE).tensors)
    (checkpoint / WEIGHTS).rename(checkpoint / "one.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "special_tokens_map.json"])
def test_a_pipe_and_a_link_in_a_circle_are_refused_by_name(checkpoint: Path, views: Views, name: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(InvalidCheckpoint, match=rf"{name} is not a regular file"):
        view_of(views, checkpoint)
    link_out(checkpoint, name, Path(name))
    with pytest.raises(InvalidCheckpoint, match=rf"{name} is a symbolic link in a circle"):
        view_of(views, checkpoint)


def test_a_pipe_in_place_of_a_file_of_rows_or_statistics_is_refused(tmp_path: Path, views: Views) -> None:
    """Its reader would wait for ever."""
    os.mkfifo(tmp_path / "fisher.safetensors")
    with pytest.raises(InvalidDataset, match="local:fisher: it is no regular file"):
        views.open_file(tmp_path / "fisher.safetensors", "local:fisher", tmp_path)


def test_a_folder_that_is_swapped_for_a_link_while_files_are_opened_is_not_followed(
    checkpoint: Path, tmp_path: Path, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tiny_checkpoint(tmp_path / "outside", seed=3)
    resolved: Callable[..., str] = os.path.realpath

    def swap_after(path: Path) -> str:
        real = resolved(path)
        if str(path).endswith(WEIGHTS) and not checkpoint.is_symlink():
            checkpoint.rename(tmp_path / "moved")
            checkpoint.symlink_to(outside)
        return real

    monkeypatch.setattr(os.path, "realpath", swap_after)
    with pytest.raises(InvalidCheckpoint, match=rf"{WEIGHTS} (cannot be read|is a symbolic link)"):
        view_of(views, checkpoint)


def test_descriptions_that_are_too_large_together_are_refused(checkpoint: Path, views: Views) -> None:
    for name in ("vocab.txt", "merges.txt"):
        with (checkpoint / name).open("wb") as stream:
            stream.truncate(MAX_TOKENIZER_BYTES)
    with pytest.raises(InvalidCheckpoint, match=rf"larger than {MAX_DESCRIPTION_BYTES} bytes"):
        view_of(views, checkpoint)


def test_keys_that_steer_loading_are_not_in_a_view(checkpoint: Path, views: Views) -> None:
    steering = {"transformers_weights": "other.safetensors", "_attn_implementation": "flash_attention_2"}
    inner = {"text_config": {"attn_implementation": "kernels-community/x", "hidden_size": 3}}
    edit_json(checkpoint / "config.json", **steering, **inner)
    config = json.loads((view_of(views, checkpoint) / "config.json").read_text())
    assert not steering.keys() & config.keys()
    assert config["text_config"] == {"hidden_size": 3}


STEERING_AND_KEPT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "config.json": (
        {
            "use_kernels": True,
            "kernel_config": {"RMSNorm": "someone/kernel"},
            "trust_remote_code": True,
            "device_map": "auto",
            "tp_plan": {"layers": "colwise"},
            "pp_plan": {},
            "weights_only": False,
            "compile_config": {"mode": "max-autotune"},
            "gradient_checkpointing": True,
            "torchscript": True,
            "output_attentions": True,
            "output_hidden_states": True,
            "name_or_path": "/srv/models/private",
            "vocab_file": "/etc/passwd",
        },
        {"use_cache": False, "pruned_heads": {"0": [1]}, "label2id": {"device_map": 0, "torchscript": 1}},
    ),
    "tokenizer_config.json": (
        {
            "fast_tokenizer_files": ["tokenizer.5.0.0.json"],
            "vocab_file": "/etc/passwd",
            "source_spm_file": "other.spm",
            "name_or_path": "/srv/models/private",
            "init_inputs": ["/etc/passwd"],
            "sp_model_kwargs": {"model_file": "/etc/passwd"},
            "trust_remote_code": True,
        },
        {"model_max_length": 30, "extra_special_tokens": {"image_file": "<image>"}, "pad_token": "<pad>"},
    ),
    "special_tokens_map.json": (
        {"vocab_file": "/etc/passwd", "note": "x", "trust_remote_code": True, "a\nb": 1},
        {
            "pad_token": {"content": "<pad>", "lstrip": False},
            "image_token": "<image>",
            "additional_special_tokens": ["<a>"],
            "extra_special_tokens": ["<b>"],
            "model_specific_special_tokens": {"end_of_image": "<c>"},
        },
    ),
    "generation_config.json": (
        {"custom_generate": "someone/code", "trust_remote_code": True, "compile_config": {"mode": "default"}},
        {"temperature": 0.5, "eos_token_id": [1, 2]},
    ),
}


@pytest.mark.parametrize("name", STEERING_AND_KEPT)
def test_each_configuration_in_a_view_lacks_the_keys_that_steer_and_keeps_the_others(
    checkpoint: Path, views: Views, name: str
) -> None:
    steering, kept = STEERING_AND_KEPT[name]
    before = json.loads((checkpoint / name).read_text()) if (checkpoint / name).exists() else {}
    (checkpoint / name).write_text(json.dumps({**before, **steering, **kept}))
    seen = json.loads((view_of(views, checkpoint) / name).read_text())
    assert not steering.keys() & seen.keys()
    assert {key: seen[key] for key in kept} == kept
    assert before.keys() - steering.keys() <= seen.keys()


def test_a_configuration_without_such_keys_is_copied_byte_for_byte(checkpoint: Path, views: Views) -> None:
    for name, (_, kept) in STEERING_AND_KEPT.items():
        before = json.loads((checkpoint / name).read_text()) if (checkpoint / name).exists() else {}
        for key in STEERING_AND_KEPT[name][0]:
            before.pop(key, None)
        (checkpoint / name).write_text(json.dumps({**before, **kept}, indent=3) + "\n")
    view = view_of(views, checkpoint)
    for name in STEERING_AND_KEPT:
        assert (view / name).read_bytes() == (checkpoint / name).read_bytes()


def test_code_of_a_tokenizer_counts_only_where_the_library_has_none_of_its_own(checkpoint: Path, views: Views) -> None:
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, model_max_length=30)
    seen = json.loads((view_of(views, checkpoint) / "tokenizer_config.json").read_text())
    assert "auto_map" not in seen
    assert seen["model_max_length"] == 30
    edit_json(checkpoint / "config.json", model_type="own")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer_config\.json has auto_map"):
        inspect_checkpoint(view_of(views, checkpoint), SOURCE)


def test_a_data_set_is_read_from_the_file_that_was_opened(tmp_path: Path, views: Views) -> None:
    rows = write_rows(tmp_path / "root" / "rows.jsonl")
    expected = rows.read_bytes()
    link = views.open_file(rows, "local:rows.jsonl", rows.parent)
    (tmp_path / "secret").write_text("secret")
    link_out(rows.parent, rows.name, tmp_path / "secret")
    assert (link.name, link.read_bytes()) == (rows.name, expected)
    with pytest.raises(InvalidDataset, match="symbolic link out"):
        views.open_file(rows, "local:rows.jsonl", rows.parent)


def test_of_one_file_and_shards_the_view_has_the_one_file(checkpoint: Path, views: Views) -> None:
    save_file({}, checkpoint / "one.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert {"one.safetensors", INDEX}.isdisjoint(file.name for file in view_of(views, checkpoint).iterdir())


def test_a_view_has_no_shard_that_a_library_would_read_as_a_pickle(checkpoint: Path, views: Views) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "one.bin")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "config.json"}}))
    view = view_of(views, checkpoint)
    assert not (view / "one.bin").exists()
    assert (view / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
