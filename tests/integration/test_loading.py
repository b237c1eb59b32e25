"""Checkpoints as running models: what is not built, and what is not left to chance."""

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM

from tests.conftest import wait_until
from tests.tiny import dataset_spec, edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.companion_checks import check_run_tokenizer, check_tokenizer
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import LowRank, TensorInfo
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.checkpoints.layout import check_layout
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.inputs import examples
from worker.engine.inputs.examples import tokenize
from worker.engine.models.loading import _adapted, load
from worker.engine.runtime.time_limits import are_late


def albert(folder: Path) -> Path:
    sizes = {"hidden_size": 8, "embedding_size": 4, "intermediate_size": 12, "num_attention_heads": 2}
    AlbertForMaskedLM(AlbertConfig(vocab_size=20, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


def configured(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("key", ["inner_group_num", "num_hidden_groups"])
def test_a_configuration_of_endless_layers_is_refused_while_they_are_built(tmp_path: Path, key: str) -> None:
    folder = albert(tmp_path / "model")
    info = inspect_checkpoint(folder, "local:model")
    check_layout(info)
    configured(folder, **{key: 10**9})
    with pytest.raises(InvalidCheckpoint) as refused:
        check_layout(inspect_checkpoint(folder, "local:model"))
    assert "by its configuration it would have many more than the 28 tensors" in refused.value.message
    configured(folder, **{key: 2})  # a few layers more are missing by name
    with pytest.raises(InvalidCheckpoint, match=r"no tensor albert\.encoder"):
        check_layout(inspect_checkpoint(folder, "local:model"))


@pytest.mark.parametrize("source", ["local:one", "local:other"])  # one layout is built for both
def test_what_does_not_fit_a_layout_is_said_of_the_checkpoint_that_it_is_in(tmp_path: Path, source: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    check_layout(inspect_checkpoint(folder, source))
    info = inspect_checkpoint(folder, source)
    name = "bert.encoder.layer.1.output.dense.bias"
    others = {key: tensor for key, tensor in info.tensors.items() if key != name}
    moved = {f"{name}.moved": replace(info.tensors[name], name=f"{name}.moved")}
    with pytest.raises(InvalidCheckpoint, match=f"checkpoint {source}: no tensor {name}, which BertFor"):
        check_layout(replace(info, tensors=others | moved))
    configured(folder, hidden_size=13)
    with pytest.raises(InvalidCheckpoint, match=f"checkpoint {source}: transformers cannot load it: .*13.*multiple"):
        check_layout(inspect_checkpoint(folder, source))


def test_no_weight_of_an_adapted_model_is_drawn_at_random(tmp_path: Path) -> None:
    info = inspect_checkpoint(tiny_checkpoint(tmp_path / "model"), "local:model")
    model = _adapted(info, FAMILIES["bert"], None)
    name = "bert.encoder.layer.1.output.dense.bias"
    with TensorReader() as reader:
        assert torch.equal(model.get_parameter(name), reader.read(info.tensors[name]))
    others = {key: tensor for key, tensor in info.tensors.items() if key != name}
    with pytest.raises(InvalidCheckpoint, match=f"no tensor {name}, which BertForSequenceClassification needs"):
        _adapted(replace(info, tensors=others), FAMILIES["bert"], None)
    with pytest.raises(InvalidCheckpoint, match=f"tensor {name} has shape"):
        _adapted(replace(info, tensors={**others, name: narrowed(tmp_path, name)}), FAMILIES["bert"], None)


def narrowed(folder: Path, name: str) -> TensorInfo:
    """Of one value, which fits any axis when it is copied."""
    save_file({name: torch.ones(1)}, folder / "narrow.safetensors")
    [tensor] = read_header(folder / "narrow.safetensors", "local:model")
    return tensor


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [9999], "tokens": ["[CLS]"]}},
}


def test_ids_that_rules_put_around_a_text_are_within_the_matrix(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer.json", post_processor=TEMPLATE)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    info = inspect_checkpoint(folder, "local:model")
    for check in (check_run_tokenizer, lambda info: load(info, torch.device("cpu"))):
        with pytest.raises(InvalidCheckpoint, match="its tokenizer has ids up to 9999, its embedding matrix"):
            check(info)


def test_segments_of_a_text_are_within_the_matrix(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", model_input_names=names)
    load(inspect_checkpoint(folder, "local:model"), torch.device("cpu"))
    single = [{"Sequence": {"id": "A", "type_id": 9}}]
    edit_json(folder / "tokenizer.json", post_processor={**TEMPLATE, "single": single, "special_tokens": {}})
    info = inspect_checkpoint(folder, "local:model")
    for check in (check_run_tokenizer, lambda info: load(info, torch.device("cpu"))):
        with pytest.raises(InvalidCheckpoint, match=r"gives the token type 9, and its config\.json has 2"):
            check(info)


def test_a_tokenizer_that_panics_on_a_row_is_the_data_sets_fault(tmp_path: Path) -> None:
    """The map of the normaliser has a place beyond its texts for `z`, which no text has that is tried before."""
    units = [256 << 10] + [0] * 1023
    node, leaf = 256 ^ ord("z"), 768
    units[node] = ord("z") | 1 << 8 | (leaf ^ node) << 10
    units[leaf] = 1 << 31 | 1_000_000
    trie = struct.pack("<1024I", *units)
    charsmap = base64.b64encode(struct.pack("<I", len(trie)) + trie + b"abc\0").decode()
    folder = tiny_checkpoint(tmp_path / "model")
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    edit_json(folder / "tokenizer.json", normalizer=normalizer)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loaded = load(inspect_checkpoint(folder, "local:model"), torch.device("cpu"))
    rows = [Row(Place("line", 1), "zz", None, None)]
    with pytest.raises(InvalidDataset, match=r"the checkpoint's tokenizer fails on it \(PanicException\)"):
        tokenize(rows, dataset_spec(tmp_path / "rows.jsonl"), loaded.tokenizer, 10, None)


def test_a_pattern_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each of 300 places the pattern tries millions of ways; the library itself gives up at ten millions."""
    monkeypatch.setattr(examples, "LONGEST_S", 0.5)
    folder = tiny_checkpoint(tmp_path / "model")
    pattern = {"type": "Split", "pattern": {"Regex": "(a*)(a*)(a*)b"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", pre_tokenizer=pattern)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loaded = load(inspect_checkpoint(folder, "local:model"), torch.device("cpu"))
    rows = [Row(Place("line", 1), "a" * 300 + "xb", None, None)]
    spec = dataset_spec(tmp_path / "rows.jsonl")
    assert not are_late()
    with pytest.raises(InvalidDataset, match=r"the checkpoint's tokenizer takes more than .* a pattern in"):
        tokenize(rows, spec, loaded.tokenizer, 10, None)
    assert are_late()
    wait_until(lambda: not are_late(), "the end of the call")
    assert tokenize([replace(rows[0], text="a")], spec, loaded.tokenizer, 10, None).examples


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RagTokenizer", "by which transformers loads no tokenizer"),
        ("AutoTokenizer", "by which transformers loads no tokenizer"),
        ("BertModel", "by which transformers loads no tokenizer"),
        ("T5Tokenizer", r"which takes a tokenizer\.json with a Unigram model, and this one has WordPiece"),
        ("BertweetTokenizer", r"which needs vocab\.txt and bpe\.codes, and that is not there"),
    ],
)
def test_a_class_that_does_not_load_the_tokenizer_is_refused_before_a_job_and_by_it(
    tmp_path: Path, name: str, message: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)
    info = inspect_checkpoint(folder, "local:model")
    for check in (check_tokenizer, check_run_tokenizer, lambda info: load(info, torch.device("cpu"))):
        with pytest.raises(InvalidCheckpoint, match=f"transformers loads its tokenizer as {name}, {message}"):
            check(info)


class Watched(TensorReader):
    """Counts how often each tensor's values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, int] = {}

    def _values(self, tensor: TensorInfo, shape: tuple[int, ...], start: int) -> Tensor:
        self.reads[tensor.name] = self.reads.get(tensor.name, 0) + 1
        return super()._values(tensor, shape, start)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_factor_that_runs_of_rows_share_is_read_once(tmp_path: Path, transposed: bool) -> None:
    """Rows of a vocabulary that differs are read in many runs."""
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 5, generator=rng)
    a, b = (torch.randn(shape, generator=rng) for shape in (((2, 12), (5, 2)) if transposed else ((2, 5), (12, 2))))
    save_file({"matrix": matrix, "a": a, "b": b}, tmp_path / "all.safetensors")
    found = {tensor.name: tensor for tensor in read_header(tmp_path / "all.safetensors", "local:model")}
    adapted = replace(found["matrix"], delta=LowRank(found["a"], found["b"], 0.5, transposed))
    product = b.double() @ a.double()
    dense = matrix.double() + 0.5 * (product.T if transposed else product)
    runs: Sequence[slice] = [slice(9, 12), slice(0, 1), slice(4, 6)]
    with (reader := Watched()):
        rows = list(reader.read_runs(adapted, runs))
        reads = dict(reader.reads)
        for some, values in zip(runs, rows, strict=True):
            torch.testing.assert_close(values.double(), dense[some], rtol=1e-6, atol=1e-6)
            assert torch.equal(values, reader.read(adapted, some))
    assert reads["b" if transposed else "a"] == 1
    assert reads["matrix"] == len(runs)
