"""Reading a checkpoint's description: what it says of a good one, and how it refuses every bad one by name."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.tiny import edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.files import INDEX, TOKENIZER_FILES, WEIGHTS, described_files
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.checkpoints.limits import (
    MAX_CONFIG_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_HEADER_BYTES,
    MAX_KEY,
    MAX_KEYS,
    MAX_NAME,
    MAX_RANK,
    MAX_TENSORS,
)
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

SOURCE = "local:expert"
SHARD = "model-00001-of-00001.safetensors"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "expert")


def weights_of(header: Any, payload: bytes = b"", *, announced: int | None = None) -> bytes:
    """A safetensors file of this header, as it is or as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if announced is None else announced) + raw + payload


def test_every_tensor_is_described_as_the_formats_own_library_describes_it(checkpoint: Path) -> None:
    info = inspect_checkpoint(checkpoint, SOURCE)
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
        assert set(info.tensors) == set(file.keys())
        for name, tensor in info.tensors.items():
            found = file.get_slice(name)
            assert (tensor.name, tensor.file, tensor.dtype) == (name, WEIGHTS, "F32")
            assert list(tensor.shape) == found.get_shape()
            assert tensor.nbytes == 4 * torch.Size(tensor.shape).numel()
    assert info.nbytes == sum(tensor.nbytes for tensor in info.tensors.values())
    assert (info.source, info.model_type, info.architecture) == (SOURCE, "bert", "BertForSequenceClassification")
    assert info.weight_files == [WEIGHTS]


def test_shards_are_read_through_their_index(checkpoint: Path) -> None:
    whole = inspect_checkpoint(checkpoint, SOURCE)
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (checkpoint / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:10], "two.safetensors": names[10:]}
    for shard, its in shards.items():
        save_file({name: tensors[name] for name in its}, checkpoint / shard)
    weight_map = {name: shard for shard, its in shards.items() for name in its}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    info = inspect_checkpoint(checkpoint, SOURCE)
    assert info.weight_files == list(shards)
    assert {name: tensor.file for name, tensor in info.tensors.items()} == weight_map
    assert {n: (t.shape, t.dtype) for n, t in info.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in whole.tensors.items()
    }


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00001.bin", "model.safetensors.pt", "config.json", "weights"])
def test_a_shard_that_the_library_would_read_as_a_pickle_is_refused(checkpoint: Path, name: str) -> None:
    """By the end of its name the library chooses how to read it, and what is read here as safetensors may be both."""
    if name != "config.json":
        (checkpoint / WEIGHTS).rename(checkpoint / name)
    (checkpoint / WEIGHTS).unlink(missing_ok=True)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"classifier.weight": name}}))
    assert_refused(checkpoint, [f"names {name}", "no .safetensors file"])


def test_one_file_goes_before_an_index_and_its_shards(checkpoint: Path) -> None:
    expected = inspect_checkpoint(checkpoint, SOURCE)
    save_file({"other": torch.zeros(1)}, checkpoint / SHARD)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"other": SHARD}}))
    assert inspect_checkpoint(checkpoint, SOURCE).tensors == expected.tensors
    (checkpoint / SHARD).unlink()  # as save_pretrained leaves the index of what was saved in shards before
    assert inspect_checkpoint(checkpoint, SOURCE).tensors == expected.tensors
    (checkpoint / INDEX).write_text("oops")
    assert inspect_checkpoint(checkpoint, SOURCE).tensors == expected.tensors


def test_code_beside_a_model_that_the_library_has_itself_is_left_out_and_said(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", auto_map={"AutoModel": "code.Model"})
    info = inspect_checkpoint(checkpoint, SOURCE)
    assert "auto_map" not in info.config
    [note] = info.notes
    assert f"config.json of {SOURCE} has auto_map" in note
    edit_json(checkpoint / "config.json", architectures=["OwnForSequenceClassification"])
    assert_refused(checkpoint, ["config.json has auto_map", "run code"])


def test_a_quantisation_that_is_not_there_is_left_out_and_said(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    info = inspect_checkpoint(checkpoint, SOURCE)
    assert "quantization_config" not in info.config
    [note] = info.notes
    assert f"config.json of {SOURCE} has a quantization_config" in note


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_sizes_follow_from_shape_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"scalar": torch.zeros((), dtype=dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    tensors["matrix"] = torch.zeros(2, 5, dtype=dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "x.safetensors", SOURCE)}
    assert {name: tensor.shape for name, tensor in found.items()} == {"scalar": (), "empty": (0, 3), "matrix": (2, 5)}
    assert {name: t.nbytes for name, t in found.items()} == {
        name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()
    }


BAD_WEIGHTS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["truncated", "0 bytes"]),
    "seven bytes": (b"1234567", ["truncated", "7 bytes"]),
    "header too large": (weights_of({}, announced=MAX_HEADER_BYTES + 1), [str(MAX_HEADER_BYTES + 1), "allowed"]),
    "cut inside its header": (weights_of({"a": F32}, announced=1000), ["truncated inside its header"]),
    "cut inside its tensors": (weights_of({"a": F32}, b"1234567"), ["truncated", "copy it again"]),
    "bytes left over": (weights_of({"a": F32}, b"123456789"), ["too long"]),
    "not JSON": (weights_of(b"{oops"), ["malformed header"]),
    "not UTF-8": (weights_of(b'{"\xff": 1}'), ["malformed header"]),
    "deeply nested": (weights_of(b'{"a":' * 200_000), ["malformed header"]),
    "not an object": (weights_of([1]), ["malformed header: it is no JSON object"]),
    "an entry that is no object": (weights_of({"a": 3}), ["malformed header", "tensor a is no JSON object"]),
    "a name that is no text": (weights_of(b'{"\\ud800": 1}'), ["malformed header", "surrogate"]),
    "no shape": (
        weights_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"12345678"),
        ["malformed", "tensor a has no shape"],
    ),
    "no offsets": (weights_of({"a": {"dtype": "F32", "shape": [2]}}), ["malformed", "tensor a has no data_offsets"]),
    "three offsets": (weights_of({"a": {**F32, "data_offsets": [0, 8, 9]}}, b"12345678"), ["tensor a", "list of two"]),
    "a shape that is no list": (weights_of({"a": {**F32, "shape": 2}}, b"12345678"), ["tensor a", "shape", "no list"]),
    "a shape of booleans": (weights_of({"a": {**F32, "shape": [2, True]}}, b"12345678"), ["tensor a", "non-integer"]),
    "unknown dtype": (weights_of({"a": {**F32, "dtype": "C64"}}, b"12345678"), ["tensor a", "C64", "BF16"]),
    "float8": (
        weights_of({"a": {**F32, "dtype": "F8_E4M3"}}, b"12345678"),
        ["tensor a", "F8_E4M3", "float8 weights are quantised"],
    ),
    "packed": (
        weights_of({"a": {**F32, "dtype": "U32"}}, b"12345678"),
        ["tensor a", "U32", "packed weights are quantised"],
    ),
    "dtype that is no name": (
        weights_of({"a": {**F32, "dtype": ["F32"]}}, b"12345678"),
        ["tensor a", "dtype", "string"],
    ),
    "negative shape": (weights_of({"a": {**F32, "shape": [-2, -1]}}, b"12345678"), ["tensor a", "negative"]),
    "fractional shape": (weights_of({"a": {**F32, "shape": [2.0]}}, b"12345678"), ["tensor a", "non-integer"]),
    "negative offset": (weights_of({"a": {**F32, "data_offsets": [-8, 0]}}), ["tensor a", "negative"]),
    "shape of another size": (weights_of({"a": {**F32, "shape": [3]}}, b"12345678"), ["tensor a", "[0, 8]"]),
    "a gap": (weights_of({"a": {**F32, "data_offsets": [4, 12]}}, b"123456789012"), ["tensor a", "[4, 12]"]),
    "overlap": (weights_of({"a": F32, "b": F32}, b"12345678"), ["tensor", "[0, 8]"]),
    "a tensor twice": (
        weights_of(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
            b"12345678",
        ),
        ["malformed header", "the key 'a' twice"],
    ),
    "a dtype twice": (
        weights_of(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"12345678"),
        ["malformed header", "the key 'dtype' twice"],
    ),
    "metadata that are text": (weights_of({"__metadata__": "pt", "a": F32}, b"12345678"), ["__metadata__"]),
    "metadata that are nested": (weights_of({"__metadata__": {"a": {}}, "a": F32}, b"12345678"), ["__metadata__"]),
    "UTF-16": (weights_of(json.dumps({"a": F32}).encode("utf-16"), b"12345678"), ["malformed header", "UTF-8"]),
    "a shape of very many ones": (weights_of({"a": {**F32, "shape": [1] * 100_000}}), ["tensor a", "100000 axes"]),
    "one axis too many": (weights_of({"a": {**F32, "shape": [1] * 8 + [2]}}, b"12345678"), ["tensor a", "9 axes"]),
    "a long name": (weights_of({"a" * 160_000: F32}, b"12345678"), ["tensor aaaa", "160000 characters"]),
    "a long name of nothing": (weights_of({"a" * 160_000: 3}), ["tensor aaaa", "no JSON object"]),
    "a number of many digits": (weights_of(b'{"a": ' + b"9" * 4000 + b"}"), ["malformed header", "4000 digits"]),
    "a number of very many digits": (weights_of(b'{"a": ' + b"9" * 400_000 + b"}"), ["malformed", "400000 digits"]),
    "a size that nobody can hold": (weights_of({"a": {**F32, "shape": [2**63, 0]}}), ["tensor a", "larger than"]),
    "an offset that nobody can hold": (
        weights_of({"a": {**F32, "shape": [0], "data_offsets": [2**64, 2**64]}}),
        ["tensor a", "larger than"],
    ),
    "more tensors than allowed": (
        weights_of({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}),
        [f"{MAX_TENSORS + 1} tensors"],
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_with_their_file_and_fault(checkpoint: Path, case: str) -> None:
    content, words = BAD_WEIGHTS[case]
    (checkpoint / WEIGHTS).write_bytes(content)
    assert_refused(checkpoint, [WEIGHTS, *words])


NAMED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "a role": ({"pad_token": "<x>"}, {}, 1),
    "a role of its own": ({"image_token": {"content": "<x>"}}, {}, 1),
    "a role that the vocabulary has": ({"pad_token": "[PAD]"}, {}, 0),
    "the same token twice": ({"pad_token": "<x>", "eos_token": "<x>"}, {}, 1),
    "lists": ({"additional_special_tokens": ["<x>"], "extra_special_tokens": {"a": "<y>", "b": "<x>"}}, {}, 2),
    "added tokens": ({"added_tokens_decoder": {"900": {"content": "<x>"}, "901": {"content": "<y>"}}}, {}, 2),
    "an older file": ({}, {"pad_token": "<x>"}, 1),
    "an older file beside added tokens": ({"added_tokens_decoder": {}}, {"pad_token": "<x>"}, 0),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_last_id_counts_tokens_that_the_library_adds(checkpoint: Path, case: str) -> None:
    config, older, added = NAMED[case]
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", older)):
        (checkpoint / name).write_text(json.dumps({"tokenizer_class": "BertTokenizer", **content}))
    own = inspect_checkpoint(checkpoint, SOURCE).last_token
    (checkpoint / "tokenizer_config.json").write_text("{}")
    (checkpoint / "special_tokens_map.json").unlink()
    plain = inspect_checkpoint(checkpoint, SOURCE).last_token
    assert plain is not None
    assert own == plain + added


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_configurations_are_utf_8_as_the_libraries_read_them(checkpoint: Path, name: str, encoding: str) -> None:
    file = checkpoint / name
    content = file.read_text() if file.exists() else "{}"
    file.write_text(content, encoding=encoding)
    with pytest.raises(ValueError), file.open(encoding="utf-8") as stream:  # noqa: PT011 - UnicodeDecodeError is one too
        json.load(stream)  # as transformers reads it
    assert_refused(checkpoint, [name, "cannot be read as JSON"])


def test_no_message_is_longer_than_a_person_reads(checkpoint: Path) -> None:
    for content, _ in BAD_WEIGHTS.values():
        (checkpoint / WEIGHTS).write_bytes(content)
        with pytest.raises(InvalidCheckpoint) as caught:
            inspect_checkpoint(checkpoint, SOURCE)
        assert len(caught.value.message) < 1500, caught.value.message[:2000]


def test_the_largest_numbers_of_axes_and_characters_are_allowed(tmp_path: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1] * (MAX_RANK - 1) + [2], "data_offsets": [0, 8]}
    (tmp_path / WEIGHTS).write_bytes(weights_of({"n" * MAX_NAME: tensor}, b"12345678"))
    [found] = read_header(tmp_path / WEIGHTS, SOURCE)
    assert (len(found.name), len(found.shape)) == (MAX_NAME, MAX_RANK)


DEEP = b'{"a": ' * MAX_DEPTH + b"{}" + b"}" * MAX_DEPTH
BAD_CONFIGS: dict[str, tuple[bytes, list[str]]] = {
    "a long key": (b'{"' + b"k" * 160_000 + b'": 1}', ["160000 characters", str(MAX_KEY)]),
    "a long key inside": (b'{"a": [{"' + b"k" * 160_000 + b'": 1}]}', ["160000 characters"]),
    "more keys than allowed": (json.dumps({str(i): 0 for i in range(MAX_KEYS + 1)}).encode(), [f"{MAX_KEYS} keys"]),
    "more keys than allowed in all": (b'{"a": [' + b'{"b": 0, "c": 0, "d": 0},' * 110_000 + b"0]}", ["keys"]),
    "deep objects": (DEEP, [f"{MAX_DEPTH} levels"]),
    "deep lists": (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", [f"{MAX_DEPTH} levels"]),
    "deeper than Python goes": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ["cannot be read as JSON"]),
    "a long number": (b'{"hidden_size": 1' + b"0" * 200 + b"}", ["201 digits", str(MAX_DIGITS)]),
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_beyond_anything_real_are_refused_by_name(checkpoint: Path, case: str, name: str) -> None:
    content, words = BAD_CONFIGS[case]
    (checkpoint / name).write_bytes(content)
    assert_refused(checkpoint, [name, *words])


def test_a_deep_tokenizer_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_bytes(b'{"model": {"vocab": {"a": 0}}, "normalizer": ' + DEEP + b"}")
    assert_refused(checkpoint, ["tokenizer.json", f"{MAX_DEPTH} levels"])


def test_real_extremes_of_configurations_are_read(checkpoint: Path) -> None:
    """The number that tokenizers say in place of no limit; labels of many words; nesting as in composite models."""
    config = json.loads((checkpoint / "config.json").read_text())
    label = "a label that says what it stands for, " * 20
    config |= {
        "text_config": {"rope": {"full": {"type": ["default"]}}},
        "id2label": {"0": label},
        "label2id": {label: 0},
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert inspect_checkpoint(checkpoint, SOURCE).config["label2id"] == {label: 0}


def test_weights_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(InvalidCheckpoint, match=rf"{SOURCE}: {WEIGHTS} cannot be read"):
        list(read_header(tmp_path / WEIGHTS, SOURCE))


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder.parent / "elsewhere")


def index(content: Any) -> Callable[[Path], object]:
    """An index in place of the one file, which is a shard by another name."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        (folder / INDEX).write_text(json.dumps(content))

    return write


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"same": torch.zeros(1)}, folder / name)
    index({"weight_map": {"same": "one.safetensors", "other": "two.safetensors"}})(folder)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (without("config.json"), ["config.json is missing"]),
    "config not JSON": (text("config.json", "{oops"), ["config.json cannot be read as JSON"]),
    "config deeply nested": (text("config.json", "[" * 200_000), ["config.json cannot be read as JSON"]),
    "config with half a surrogate pair": (
        text("config.json", '{"architectures": ["\\ud800"]}'), ["config.json", "surrogate"],
    ),
    "config a list": (text("config.json", "[]"), ["config.json is not a JSON object"]),
    "config too large": (text("config.json", " " * (MAX_CONFIG_BYTES + 1)), ["config.json", str(MAX_CONFIG_BYTES)]),
    "code in config": (
        lambda folder: edit_json(folder / "config.json", model_type="own", auto_map={"AutoModel": "code.Model"}),
        ["config.json has auto_map", "run code"],
    ),
    "code in tokenizer": (
        lambda folder: edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}),
        ["tokenizer_config.json has auto_map"],
    ),
    "tokenizer config a list": (text("tokenizer_config.json", "[]"), ["tokenizer_config.json is not a JSON object"]),
    "tokenizer not JSON": (text("tokenizer.json", "oops"), ["tokenizer.json cannot be read as JSON"]),
    "no weights": (without(WEIGHTS), [WEIGHTS, INDEX]),
    "a pickle": (pickle_only, ["pytorch_model.bin", "not opened", "save_pretrained('OUT')"]),
    "index without map": (index({"metadata": {}}), [INDEX, "no weight_map"]),
    "index with empty map": (index({"weight_map": {}}), [INDEX, "no weight_map"]),
    "index with a list": (index({"weight_map": ["x"]}), [INDEX, "no weight_map"]),
    "index names a missing file": (index({"weight_map": {"a": "gone.safetensors"}}), ["gone.safetensors", "not in"]),
    "index names a file elsewhere": (index({"weight_map": {"a": "../expert/model.safetensors"}}), ["../expert"]),
    "index names a tensor that is nowhere": (
        index({"weight_map": {"lost.weight": SHARD}}), [INDEX, "lost.weight", "no weight file has it"],
    ),
    "a tensor in two files": (twice, ["tensor same", "one.safetensors", "two.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "auto_class"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("Whatever", "AutoModel"),
    ],
)
def test_a_pickle_is_converted_by_the_class_of_its_architecture(
    checkpoint: Path, architecture: str, auto_class: str
) -> None:
    pickle_only(checkpoint)
    edit_json(checkpoint / "config.json", architectures=[architecture])
    assert_refused(checkpoint, [f"from transformers import {auto_class} as A;", "save_pretrained('OUT')"])


def test_characters_may_be_escaped_as_whole_surrogate_pairs(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", _name_or_path="\U0001f600")
    assert "\\ud83d" in (checkpoint / "config.json").read_text()
    assert inspect_checkpoint(checkpoint, SOURCE).config["_name_or_path"] == "\U0001f600"


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_with_what_is_wrong(checkpoint: Path, case: str) -> None:
    spoil, words = BAD_FOLDERS[case]
    spoil(checkpoint)
    assert_refused(checkpoint, words)


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    assert_refused(checkpoint / WEIGHTS, ["folder", "save_pretrained"])


def test_a_config_without_architecture_names_none(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", architectures=None, model_type=None)
    info = inspect_checkpoint(checkpoint, SOURCE)
    assert (info.model_type, info.architecture) == ("", "")


def test_vocabularies_are_compared_whatever_file_they_are_in(checkpoint: Path) -> None:
    first = inspect_checkpoint(checkpoint, SOURCE).vocabulary
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    edit_json(checkpoint / "tokenizer.json", post_processor=None, truncation={"max_length": 7})
    assert inspect_checkpoint(checkpoint, SOURCE).vocabulary == first
    (checkpoint / "tokenizer.json").unlink()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    (checkpoint / "vocab.txt").write_text("\n".join(tokens) + "\n")
    assert inspect_checkpoint(checkpoint, SOURCE).vocabulary == first
    (checkpoint / "vocab.txt").write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]) + "\n")
    assert inspect_checkpoint(checkpoint, SOURCE).vocabulary != first
    (checkpoint / "vocab.txt").unlink()
    assert inspect_checkpoint(checkpoint, SOURCE).vocabulary == {}


def with_tokenizer(checkpoint: Path, files: Mapping[str, bytes]) -> CheckpointInfo:
    """The checkpoint with these tokenizer files alone."""
    for name in TOKENIZER_FILES:
        (checkpoint / name).unlink(missing_ok=True)
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
    return inspect_checkpoint(checkpoint, SOURCE)


def tokenizer_json(**model: Any) -> dict[str, bytes]:
    return {"tokenizer.json": json.dumps({"model": model}).encode()}


BPE = {"a": 0, "b": 1, "ab": 2}


def test_a_bpe_is_its_tokens_and_its_merges_whatever_file_they_are_in(checkpoint: Path) -> None:
    pairs = tokenizer_json(vocab=BPE, merges=[["a", "b"]])
    first = with_tokenizer(checkpoint, pairs).vocabulary
    vocab = {"vocab.json": json.dumps(dict(reversed(BPE.items()))).encode()}
    for same in (
        tokenizer_json(type="BPE", merges=["a b"], vocab=BPE),
        {**vocab, "merges.txt": b"#version: 0.2\na b\n"},
        {**vocab, "merges.txt": b"a b"},
        {**pairs, "vocab.json": b"{}", "merges.txt": b""},  # tokenizer.json is what transformers reads
    ):
        assert with_tokenizer(checkpoint, same).vocabulary == first, same
    for other in (
        tokenizer_json(vocab=BPE, merges=[["b", "a"]]),
        tokenizer_json(vocab={**BPE, "c": 3}, merges=["a b"]),
        {**vocab, "merges.txt": b"b a\n"},
        {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"},
    ):
        assert with_tokenizer(checkpoint, other).vocabulary.keys() == {"tokens"}
        assert with_tokenizer(checkpoint, other).vocabulary != first, other


def test_a_unigram_is_its_pieces_in_order_with_their_scores(checkpoint: Path) -> None:
    pieces = [["<unk>", 0.0], ["▁one", -1.5], ["o", -3.25]]
    first = with_tokenizer(checkpoint, tokenizer_json(type="Unigram", unk_id=0, vocab=pieces)).vocabulary
    assert with_tokenizer(checkpoint, tokenizer_json(vocab=pieces, byte_fallback=False)).vocabulary == first
    for other in (pieces[::-1], pieces[:2], [*pieces[:2], ["o", -3.5]]):
        assert with_tokenizer(checkpoint, tokenizer_json(vocab=other)).vocabulary != first


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "spm.model", "spiece.model"])
def test_a_sentencepiece_model_is_known_by_its_bytes_and_compared_with_its_like(checkpoint: Path, name: str) -> None:
    fast = tokenizer_json(vocab=[["<unk>", 0.0]])
    alone = with_tokenizer(checkpoint, {name: b"pieces"}).vocabulary
    both = with_tokenizer(checkpoint, {name: b"pieces", **fast}).vocabulary
    assert alone.keys() == {"sentencepiece"}
    assert both["sentencepiece"] == alone["sentencepiece"]
    assert both["tokens"] == with_tokenizer(checkpoint, fast).vocabulary["tokens"]
    assert with_tokenizer(checkpoint, {name: b"others"}).vocabulary != alone


def test_a_token_may_be_what_python_takes_for_a_lines_end(checkpoint: Path) -> None:
    tokens = ["[PAD]", "\u2028", "\x85", "one"]
    expected = with_tokenizer(checkpoint, tokenizer_json(vocab={t: i for i, t in enumerate(tokens)})).vocabulary
    for end in ("\n", "\r\n"):
        file = {"vocab.txt": "".join(token + end for token in tokens).encode()}
        assert with_tokenizer(checkpoint, file).vocabulary == expected


BROKEN_TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "model is null": ("tokenizer.json", b'{"model": null}'),
    "merges are a number": ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": 5}}'),
    "model is a list": ("tokenizer.json", b'{"model": []}'),
    "half a surrogate pair": ("tokenizer.json", b'{"model": {"vocab": {"\\ud800": 0}}}'),
    "BPE vocabulary is a list": ("vocab.json", b"[]"),
    "vocabulary not UTF-8": ("vocab.txt", "é\n".encode("latin-1")),
}


@pytest.mark.parametrize("case", BROKEN_TOKENIZERS)
def test_broken_tokenizer_files_are_refused_by_name(checkpoint: Path, case: str) -> None:
    name, content = BROKEN_TOKENIZERS[case]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / name).write_bytes(content)
    assert_refused(checkpoint, [name])


def assert_refused(checkpoint: Path, words: list[str]) -> None:
    """Refused as an invalid checkpoint, in a message with its source and `words`."""
    with pytest.raises(InvalidCheckpoint) as caught:
        inspect_checkpoint(checkpoint, SOURCE)
    assert caught.value.detail["checkpoint"] == SOURCE
    missing = [word for word in (SOURCE, *words) if word not in caught.value.message]
    assert not missing, caught.value.message


def test_files_of_a_checkpoint_are_those_beside_the_weights_and_those_of_its_modules_and_templates() -> None:
    mine = ["config.json", "tokenizer.json", "source.spm", "chat_template.json", "generation_config.json"]
    further = ["additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.v2.jinja"]
    others = [
        "README.md", "onnx/model.onnx", "checkpoint-500/config.json", "additional_chat_templates/a/b.jinja",
        "additional_chat_templates/.jinja", "additional_chat_templates/../x.jinja", "2_Dense/pytorch_model.bin",
        "../1_Pooling/config.json", "1_Pooling/../config.json", "1_Pooling", "1_Pooling/config.json.bak",
    ]  # fmt: skip
    of_modules = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert described_files({*mine, *further, *others, *of_modules}) == [*mine[:3], *mine[3:], *sorted(further)]
    sentence = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]
    found = described_files({*others, *of_modules, *sentence})
    assert found == [*sentence, *of_modules]


STAND_INS = {
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 438002268\n": (
        "a Git LFS pointer stands in its place; fetch the file itself by `git lfs pull`"
    ),
    "/annex/objects/SHA256E-s438002268--4d7a2146.safetensors\n": (
        "a git-annex pointer stands in its place; fetch the file itself by `git annex get`"
    ),
    "../.git/annex/objects/w8/pv/SHA256E-s31390--f50d/SHA256E-s31390--f50d": "a git-annex pointer stands",
    "<!DOCTYPE html>\n<html><head><title>Sign in</title>": "a web page stands in its place; download the file itself",
    "\ufeff\n <HTML lang='en'>": "a web page stands in its place",
    '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "a web page stands in its place",
}
"""Files in the place of others, each with the message that names it."""


@pytest.mark.parametrize("stand_in", STAND_INS)
@pytest.mark.parametrize(
    "name",
    [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model", INDEX, "shard.safetensors",
     "chat_template.jinja", "additional_chat_templates/rag.jinja", "2_Dense/model.safetensors"],
)  # fmt: skip
def test_a_pointer_or_a_web_page_in_the_place_of_a_file_is_named(checkpoint: Path, name: str, stand_in: str) -> None:
    if name == "shard.safetensors":
        (checkpoint / WEIGHTS).unlink()
        (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    if name.startswith("2_Dense"):
        (checkpoint / "modules.json").write_text("[]")
    if name == INDEX:
        (checkpoint / WEIGHTS).unlink()
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(stand_in)
    with pytest.raises(InvalidCheckpoint) as caught:
        inspect_checkpoint(checkpoint, SOURCE)
    assert f"{name} is not there: {STAND_INS[stand_in]}" in caught.value.message
    assert caught.value.detail["file"] == name


@pytest.mark.parametrize("start", [b"Entry not found", b"PK\x03\x04\x00\x00\x08\x08", b"\x80\x02}q\x00X\x00\x00"])
def test_other_bytes_in_the_place_of_weights_are_quoted(checkpoint: Path, start: bytes) -> None:
    (checkpoint / WEIGHTS).write_bytes(start)
    with pytest.raises(InvalidCheckpoint) as caught:
        inspect_checkpoint(checkpoint, SOURCE)
    assert f"or it is no safetensors file, since it begins with {start[:8]!r}" in caught.value.message


@pytest.mark.parametrize(
    ("name", "limit"),
    [("vocab.json", 50_000_000), ("generation_config.json", MAX_CONFIG_BYTES), ("chat_template.jinja", 1_000_000),
     ("source.spm", 50_000_000), ("preprocessor_config.json", MAX_CONFIG_BYTES),
     ("additional_chat_templates/rag.jinja", 1_000_000)],
)  # fmt: skip
def test_a_file_beside_the_weights_may_not_be_larger_than_such_files_are(
    checkpoint: Path, name: str, limit: int
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    with (checkpoint / name).open("wb") as stream:
        stream.truncate(limit + 1)
    with pytest.raises(InvalidCheckpoint, match=f"{name} is larger than {limit} bytes"):
        inspect_checkpoint(checkpoint, SOURCE)


def test_files_beside_the_weights_have_a_limit_together_and_in_number(checkpoint: Path) -> None:
    for name in ("source.spm", "target.spm"):
        with (checkpoint / name).open("wb") as stream:
            stream.truncate(45_000_000)
    with pytest.raises(InvalidCheckpoint, match=r"its files beside the weights have 90\d{6} bytes; 80000000 are"):
        inspect_checkpoint(checkpoint, SOURCE)
    for name in ("source.spm", "target.spm"):
        (checkpoint / name).unlink()
    (checkpoint / "additional_chat_templates").mkdir()
    for number in range(200):
        (checkpoint / "additional_chat_templates" / f"{number}.jinja").touch()
    with pytest.raises(InvalidCheckpoint, match=r"it has 20\d files beside the weights; 200 are allowed"):
        inspect_checkpoint(checkpoint, SOURCE)
