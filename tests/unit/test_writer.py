"""Checkpoints as they are loaded, and as they are written: shards, folders, and what transformers makes of them."""

import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import (
    Tensors,
    edit_json,
    edit_tensors,
    merge_spec,
    model_spec,
    read_model,
    silent,
    tiny_checkpoint,
    tiny_texts,
    write_rows,
)
from worker.engine.catalog.checkpoints.files import INDEX
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.planning.plan import PlannedTensor
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, NumericalError
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.checkpoints.reader import Digests, TensorReader, digest_file
from worker.engine.checkpoints.writer import ShardWriter, cut_into_shards, largest_first
from worker.engine.jobs.engine import Engine
from worker.engine.models.loading import ModelCache, load
from worker.engine.runtime.threads import in_threads

CPU = torch.device("cpu")
LABELS = {"two": 2, "three": 3, "one": 1}
TINY_SHARD_BYTES = 3000


def planned(name: str, shape: tuple[int, ...] = (2, 3), dtype: str = "F32") -> PlannedTensor:
    return PlannedTensor(Slot(name, Kind.UP, 0, False), TensorPlace(name, 0.0), shape, dtype, ())


def rows_of(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """One row at a time, of a tensor that has any."""
    if not values.dim():
        yield slice(0, 1), values
    for row in range(len(values) if values.dim() else 0):
        yield slice(row, row + 1), values[row : row + 1]


def test_a_shard_is_what_the_formats_own_library_reads(tmp_path: Path) -> None:
    values = {
        "narrow": torch.randn(3),
        "matrix": torch.randn(2, 3).double(),
        "scalar": torch.tensor(0.1),
        "none": torch.ones(0, 4),
    }
    dtypes = {"narrow": "BF16", "matrix": "F64", "scalar": "F16", "none": "F32"}
    shard = [planned(name, tuple(value.shape), dtypes[name]) for name, value in values.items()]
    with ShardWriter(tmp_path / "x.safetensors", shard) as writer:
        for tensor in writer.tensors:
            writer.write(tensor, rows_of(values[tensor.slot.name]))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == values.keys()
    assert torch.equal(found["narrow"], values["narrow"].bfloat16())
    assert torch.equal(found["matrix"], values["matrix"])
    assert torch.equal(found["scalar"], values["scalar"].half())
    assert found["none"].shape == (0, 4)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert writer.written.sha256 == hashlib.sha256(content).hexdigest() == digest_file(tmp_path / "x.safetensors")
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_tensors_that_do_not_lie_in_order_are_written_in_order(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(3, 2).T
    with ShardWriter(tmp_path / "x.safetensors", [planned("a")]) as writer:
        writer.write(writer.tensors[0], rows_of(matrix))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], matrix)


def write(path: Path, shard: list[PlannedTensor], *values: Tensor, then: type[BaseException] | None = None) -> None:
    with ShardWriter(path, shard) as writer:
        for tensor, value in zip(writer.tensors, values, strict=False):
            writer.write(tensor, rows_of(value))
        if then:
            raise then


def test_an_exception_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [planned("a")], torch.zeros(2, 3), then=KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_too_few_is_an_error_and_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="x: 1 of 2 tensors"):
        write(tmp_path / "x", [planned("a"), planned("b")], torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a has rows of \(1, 2\), planned was \(2, 3\)"):
        write(tmp_path / "x", [planned("a")], torch.zeros(3, 2))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", [planned("a")], torch.zeros(2, 3))
    assert (tmp_path / "x").read_text() == "mine"


def many_tensors() -> dict[str, Tensor]:
    """Of several dtypes' widths, of none, one and many rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0, 4), (1,), (7,), (5, 3), (40, 11), (1, 600)]
    return {f"t{i:03d}": torch.randn(shapes[i % len(shapes)], generator=generator) for i in range(150)}


def shard_of(values: Tensors) -> list[PlannedTensor]:
    dtypes = ("F64", "F32", "BF16", "F16")
    return [planned(name, tuple(value.shape), dtypes[i % 4]) for i, (name, value) in enumerate(values.items())]


@pytest.mark.parametrize("seed", range(5))
def test_tensors_in_any_order_from_several_threads_are_the_same_file(tmp_path: Path, seed: int) -> None:
    values = many_tensors()
    shard = shard_of(values)
    in_order, mixed = tmp_path / "in_order", tmp_path / "mixed"
    write(in_order, shard, *(values[tensor.slot.name] for tensor in ShardWriter(in_order, shard).tensors))
    with ShardWriter(mixed, shard) as writer:
        tensors = random.Random(seed).sample(writer.tensors, len(shard))
        in_threads(lambda t: writer.write(t, rows_of(values[t.slot.name])), tensors, 8, lambda: None)
    assert mixed.read_bytes() == in_order.read_bytes()
    assert writer.written.sha256 == hashlib.sha256(mixed.read_bytes()).hexdigest()


@pytest.mark.parametrize(("threads", "first"), [(1, ["k"]), (2, ["h", "k"]), (100, list("abcdefghijkl"))])
def test_what_others_would_wait_for_comes_first_and_the_rest_in_order(
    tmp_path: Path, threads: int, first: list[str]
) -> None:
    """Of 128 elements a 16th, 8, is much for one thread, a 32nd for one of two."""
    rows = {name: {"h": 6, "k": 102}.get(name, 2) for name in "abcdefghijkl"}
    shards = [[planned(name, (rows[name],)) for name in names] for names in ("abcdefg", "hijkl")]
    work = [(ShardWriter(tmp_path / "x", shard), tensor) for shard in shards for tensor in shard]
    ordered = [tensor.slot.name for _, tensor in largest_first(work, threads)]
    assert ordered == [*first, *(name for name in "abcdefghijkl" if name not in first)]


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_an_error_in_one_of_several_threads_leaves_no_file_and_no_descriptor(tmp_path: Path) -> None:
    values = many_tensors()
    values["t077"].view(-1)[-1:] = float("nan")
    before = descriptors()

    def merge_into(path: Path) -> None:
        with ShardWriter(path, shard_of(values)) as writer:
            in_threads(lambda t: writer.write(t, rows_of(values[t.slot.name])), writer.tensors, 4, lambda: None)

    with pytest.raises(NumericalError, match="t077"):
        merge_into(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_a_thread_that_is_overtaken_does_not_close_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second time would close whatever file has been given the number since."""
    lock = Lock()

    class Overtaken:
        """Between the look at what is complete and this lock, another thread does all that there is to do."""

        def acquire(self, blocking: bool) -> bool:
            monkeypatch.setattr(writer, "_digesting", lock)
            writer._follow(writer._open())
            return lock.acquire(blocking)

        def release(self) -> None:
            lock.release()

    with ShardWriter(tmp_path / "x", [planned("a")]) as writer:
        monkeypatch.setattr(writer, "_digesting", Overtaken())
        writer.write(writer.tensors[0], rows_of(torch.zeros(2, 3)))
    assert writer.written.sha256 == digest_file(tmp_path / "x")


def test_a_thread_may_be_overtaken_while_it_looks_at_what_is_complete(tmp_path: Path) -> None:
    class Overtaken(list[PlannedTensor]):
        """When it is first asked for its length, another thread does all that there is to do."""

        asked = False

        def __len__(self) -> int:
            if not self.asked:
                self.asked = True
                writer._follow(writer._open())
            return super().__len__()

    with ShardWriter(tmp_path / "x", [planned("a")]) as writer:
        writer.tensors = Overtaken(writer.tensors)
        writer.write(writer.tensors[0], rows_of(torch.zeros(2, 3)))
    assert writer.tensors.asked
    assert writer.written.sha256 == digest_file(tmp_path / "x")


def test_a_file_that_somebody_else_cuts_short_is_an_error(tmp_path: Path) -> None:
    """Its digest is of what it holds, and would wait for the rest for ever."""
    path = tmp_path / "x"

    def cut_between() -> None:
        with ShardWriter(path, [planned("a"), planned("b")]) as writer:
            first, second = writer.tensors
            writer.write(second, rows_of(torch.ones(2, 3)))
            os.truncate(path, 8)
            writer.write(first, rows_of(torch.ones(2, 3)))

    with pytest.raises(OSError, match="became shorter") as caught:
        cut_between()
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("max_bytes", "cuts"), [(1, [1] * 5), (24, [1] * 5), (48, [2, 2, 1]), (60, [2, 2, 1]), (10**9, [5])]
)
def test_shards_are_consecutive_runs_within_the_limit(max_bytes: int, cuts: list[int]) -> None:
    tensors = [planned(str(i)) for i in range(5)]  # of 24 bytes
    shards = cut_into_shards(tensors, max_bytes)
    assert [len(shard) for shard in shards] == cuts
    assert [tensor for shard in shards for tensor in shard] == tensors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("writer")
    found = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        found[name] = tiny_checkpoint(root / name, labels=labels, seed=seed)
        write_rows(root / f"{name}.jsonl", labels=labels, seed=seed)
    return found


def merge(checkpoints: dict[str, Path], folder: Path, **output: Any) -> dict[str, Path]:
    """The folder of each model in the artifact of their average."""
    models = [model_spec(path) for path in checkpoints.values()]
    Engine().merge(merge_spec(folder, models, {"name": "average"}, **output), silent)
    return {name: folder / "models" / name for name in checkpoints}


def merged_in_memory(checkpoints: dict[str, Path], name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model `name` with the average of all backbones, rounded to `dtype`, and its own head."""
    versions = [read_model(path) for path in checkpoints.values()]
    own = read_model(checkpoints[name])
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints[name], dtype=torch.float32).eval()
    average = {key: torch.stack([v[key] for v in versions]).mean(0) for key in own if not key.startswith("classifier")}
    model.load_state_dict({key: tensor.to(dtype).float() for key, tensor in {**own, **average}.items()})
    return model


def logits(model: Any, folder: Path) -> Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(tiny_texts(5), padding=True, return_tensors="pt")
    with torch.inference_mode():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("max_shard_bytes", [1, TINY_SHARD_BYTES, 5_000_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_artifact_models_load_and_give_the_logits_of_the_merge_in_memory(
    checkpoints: dict[str, Path], tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    asked = str(dtype).removeprefix("torch.")
    folders = merge(checkpoints, tmp_path, dtype=asked, max_shard_bytes=max_shard_bytes)
    for name, folder in folders.items():
        as_stored = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
        assert as_stored.dtype == dtype
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values()), report
        expected = logits(merged_in_memory(checkpoints, name, dtype), checkpoints[name])
        assert expected.shape == (5, LABELS[name])
        # A bfloat16 may round either way where the float32 mean is between two.
        tolerance = {torch.bfloat16: 0.02, torch.float16: 0.002}.get(dtype, 1e-5)
        torch.testing.assert_close(logits(model.eval(), folder), expected, rtol=tolerance, atol=tolerance)


def test_the_backbone_is_one_file_under_every_models_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folders = merge(checkpoints, tmp_path, max_shard_bytes=TINY_SHARD_BYTES)
    first = folders["two"]
    *backbone, head = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(backbone) > 3
    for folder in folders.values():
        assert sorted(path.name for path in folder.glob("*.safetensors")) == [*backbone, head]
        assert all(os.path.samefile(folder / name, first / name) for name in backbone)
        assert set(load_file(folder / head)) == {"classifier.weight", "classifier.bias"}
    assert len({(folder / head).stat().st_ino for folder in folders.values()}) == len(folders)
    assert (first / backbone[0]).stat().st_nlink == len(folders)


def test_heads_are_the_experts_own_bits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in merge(checkpoints, tmp_path).items():
        found, own = read_model(folder), read_model(checkpoints[name])
        assert all(torch.equal(found[key], own[key]) for key in ("classifier.weight", "classifier.bias"))


def test_the_index_names_every_tensor_once_with_its_shard(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in merge(checkpoints, tmp_path, max_shard_bytes=TINY_SHARD_BYTES).items():
        index = json.loads((folder / INDEX).read_text())
        by_file = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        assert index["weight_map"] == {key: file for file, tensors in by_file.items() for key in tensors}
        assert set(index["weight_map"]) == set(read_model(checkpoints[name]))
        sizes = [tensor.nbytes for tensors in by_file.values() for tensor in tensors.values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        for file, tensors in by_file.items():
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= TINY_SHARD_BYTES, file
            assert file.endswith(f"-of-{len(by_file):05d}.safetensors")


def test_a_models_folder_has_its_own_config_and_tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    own = {name: Path(shutil.copytree(path, tmp_path / "in" / name)) for name, path in checkpoints.items()}
    edit_json(own["two"] / "config.json", _name_or_path="/home/someone/secret", torch_dtype="float32", dtype=None)
    for name, folder in merge(own, tmp_path / "out", dtype="bfloat16").items():
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((own[name] / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert not {"_name_or_path", "torch_dtype"} & set(config)
        ignored = {"dtype", "torch_dtype", "_name_or_path"}
        assert {k: v for k, v in config.items() if k not in ignored} == {
            k: v for k, v in before.items() if k not in ignored
        }
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / file).read_bytes() == (own[name] / file).read_bytes()
        inspected = inspect_checkpoint(folder, "again")
        assert inspected.vocabulary == inspect_checkpoint(own[name], "before").vocabulary


def test_an_artifact_merges_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    first = merge(checkpoints, tmp_path / "first", max_shard_bytes=TINY_SHARD_BYTES)
    again = merge(first, tmp_path / "again")
    for name, folder in again.items():
        found, expected = read_model(folder), read_model(first[name])
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_values_that_the_asked_dtype_cannot_hold_are_an_error_that_names_the_tensor(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    large = {name: Path(shutil.copytree(path, tmp_path / "in" / name)) for name, path in checkpoints.items()}
    tensor = "bert.encoder.layer.0.output.dense.weight"

    def enlarge(tensors: Tensors) -> None:
        tensors[tensor][0, 0] = 1e6

    for path in large.values():
        edit_tensors(path, enlarge)
    with pytest.raises(NumericalError, match=tensor):
        merge(large, tmp_path / "out", dtype="float16")


def test_inputs_are_left_as_they_were(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def state() -> dict[Path, str]:
        return {p: digest_file(p) for root in checkpoints.values() for p in sorted(root.iterdir())}

    before = state()
    models = [model_spec(path, path.with_suffix(".jsonl")) for path in checkpoints.values()]
    Engine().merge(merge_spec(tmp_path, models), silent)
    assert state() == before


def test_a_listener_can_stop_a_merge_and_no_manifest_is_left(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def stop(phase: str, done: int, *_: object) -> None:
        if phase == "merging" and done == 3:
            raise TimeoutError

    models = [model_spec(path) for path in checkpoints.values()]
    with pytest.raises(TimeoutError):
        Engine().merge(merge_spec(tmp_path, models, {"name": "average"}), stop)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert not (tmp_path / "manifest.json").exists()


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_nothing_of_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The limit on a process's files stands for the disk: writes beyond it fail from then on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    started: list[Path] = []

    def fill(phase: str, done: int, *_: object) -> None:
        if phase == "merging" and done == 3:
            started.extend(tmp_path.rglob("*.safetensors"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    models = [model_spec(path, path.with_suffix(".jsonl")) for path in checkpoints.values()]
    one_by_one = {"name": "regmean", "examples": 8}  # so that the limit comes after the third tensor for sure
    try:
        with pytest.raises(OSError, match="File too large"):
            Engine().merge(merge_spec(tmp_path, models, one_by_one), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert started
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """One to be spoilt."""
    return Path(shutil.copytree(checkpoints["two"], tmp_path / "expert"))


def without(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: {n: t for n, t in tensors.items() if n != name})


def with_value(name: str, value: float) -> Callable[[Path], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return lambda path: edit_tensors(path, edit)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", **changes)


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def unknown_tokenizer(path: Path) -> None:
    edit_json(path / "tokenizer.json", model={"type": "Unheard", "vocab": {"one": 0}})


def a_token_too_many(path: Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["hundred"] = 100  # the embedding matrix ends at 99
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


UNLOADABLE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no pooler": (without("bert.pooler.dense.bias"), ["no tensor bert.pooler.dense.bias"]),
    "no head": (without("classifier.weight"), ["no tensor classifier.weight", "BertForSequenceClassification"]),
    "not a number": (with_value("bert.pooler.dense.weight", float("nan")), ["bert.pooler.dense.weight", "NaN"]),
    "infinite head": (with_value("classifier.bias", float("-inf")), ["classifier.bias", "infinite"]),
    "a vocabulary size that is not the matrix's": (
        config(vocab_size=50),
        ["word_embeddings.weight has shape [100, 16]"],
    ),
    "unknown activation": (config(hidden_act="nope"), ["transformers cannot load it"]),
    "a setting of the wrong type": (config(layer_norm_eps="small"), ["layer_norm_eps"]),
    "a padding token out of range": (config(pad_token_id=1000), ["transformers cannot load it"]),
    "an unknown kind of tokenizer": (unknown_tokenizer, ["tokenizer.json cannot be loaded"]),
    # Without these two, every word would be the same unknown token, and an id would read past the matrix.
    "no tokenizer": (no_tokenizer, ["tokenizer"]),
    "a token without embedding": (a_token_too_many, ["tokenizer"]),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_a_checkpoint_that_cannot_run_is_refused_with_its_name(checkpoint: Path, case: str) -> None:
    spoil, words = UNLOADABLE[case]
    spoil(checkpoint)
    with pytest.raises(InvalidCheckpoint) as caught:
        load(inspect_checkpoint(checkpoint, "local:expert"), CPU)
    missing = [word for word in ("local:expert", *words) if word not in caught.value.message]
    assert not missing, caught.value.message


def test_a_loaded_model_is_float32_without_dropout_or_gradients(tmp_path: Path) -> None:
    narrow = tiny_checkpoint(tmp_path / "narrow", dtype=torch.bfloat16)
    loaded = load(inspect_checkpoint(narrow, "narrow"), CPU)
    assert not loaded.model.training
    assert {(p.dtype, p.requires_grad) for p in loaded.model.parameters()} == {(torch.float32, False)}
    assert loaded.max_length == 48


def test_the_length_limit_is_the_smaller_of_models_and_tokenizers(checkpoint: Path) -> None:
    for limit, expected in ((512, 48), (20, 20), (None, 48)):
        edit_json(checkpoint / "tokenizer_config.json", model_max_length=limit)
        assert load(inspect_checkpoint(checkpoint, "x"), CPU).max_length == expected


def test_a_model_is_loaded_once_until_its_files_change(checkpoint: Path) -> None:
    cache = ModelCache(CPU)
    first = cache.get(inspect_checkpoint(checkpoint, "x"))
    with Views() as views:
        info = inspect_checkpoint(views.open(checkpoint, "x", checkpoint), "x")
        again = cache.get(info)
    assert again.model is first.model
    assert again.info is info
    with_value("classifier.bias", 5.0)(checkpoint)
    assert cache.get(inspect_checkpoint(checkpoint, "x")).model is not first.model


def test_a_changed_tokenizer_is_loaded_anew(checkpoint: Path) -> None:
    cache = ModelCache(CPU)
    assert cache.get(inspect_checkpoint(checkpoint, "x")).max_length == 48
    edit_json(checkpoint / "tokenizer_config.json", model_max_length=20)
    assert cache.get(inspect_checkpoint(checkpoint, "x")).max_length == 20


def test_the_model_used_longest_ago_makes_room(checkpoints: dict[str, Path]) -> None:
    infos = {name: inspect_checkpoint(path, name) for name, path in checkpoints.items()}
    of_one = infos["three"].nbytes
    cache = ModelCache(CPU, capacity_bytes=2 * of_one)
    loaded = {name: cache.get(infos[name]) for name in ("two", "three")}
    cache.get(infos["two"])
    cache.get(infos["one"])
    assert cache.get(infos["two"]).model is loaded["two"].model
    assert cache.get(infos["three"]).model is not loaded["three"].model


def test_a_file_that_changes_under_a_reader_is_refused_by_name(checkpoint: Path) -> None:
    info = inspect_checkpoint(checkpoint, "local:expert")
    file = checkpoint / "model.safetensors"
    with TensorReader() as reader:
        last = max(info.tensors.values(), key=lambda tensor: tensor.offset)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(InvalidCheckpoint, match=r"local:expert: model\.safetensors became shorter"):
            reader.read(last)
    file.unlink()
    with TensorReader() as reader, pytest.raises(InvalidCheckpoint, match=r"model\.safetensors cannot be read"):
        reader.read(info.tensors["classifier.bias"])


def test_a_file_is_not_blamed_for_too_many_that_are_open(checkpoint: Path) -> None:
    tensor = inspect_checkpoint(checkpoint, "local:expert").tensors["classifier.bias"]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with TensorReader() as reader:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                reader.read(tensor)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert reader.read(tensor).shape == tensor.shape


def test_the_digest_of_a_checkpoint_is_of_its_weights_and_config(checkpoint: Path) -> None:
    def digest() -> str:
        return Digests().of_checkpoint(inspect_checkpoint(checkpoint, "x"))

    first = digest()
    lines = "".join(
        f"{name}\0{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert first == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    with_value("classifier.bias", 5.0)(checkpoint)
    assert digest() != first
