"""The class of a tokenizer, and whether it loads, are what the library itself says."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers

from worker.engine.catalog.checkpoints.companion_checks import TEXT
from worker.engine.catalog.checkpoints.library import tokenizer_table
from worker.engine.catalog.checkpoints.tokenizer_classes import tokenizer_class
from worker.engine.checkpoints.library_tokenizers import class_entry, models

TYPES = ("bert", "t5", "llama", "gpt2", "albert", "roberta", "modernbert", "opt", "mamba", "phi3", "encoder-decoder")
OF_EACH_KIND = {"bert", "t5", "llama", "gpt2", "encoder-decoder"}
NAMES = (
    "PreTrainedTokenizerFast", "PreTrainedTokenizer", "MyTokenizer", "MyTokenizerFast", "AutoTokenizer",
    "BertTokenizer", "BertTokenizerFast", "BartTokenizer", "T5TokenizerFast", "XLMRobertaTokenizer", "LlamaTokenizer",
    "ByT5Tokenizer", "BertweetTokenizer", "GPT2Tokenizer",
)  # fmt: skip
BARE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "post_processor": None, "decoder": None,
}  # fmt: skip
STEPS: tuple[dict[str, Any], ...] = (
    {"type": "Whitespace"},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
)


@pytest.mark.parametrize(
    "model_type", [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in TYPES]
)
def test_the_class_of_a_tokenizer_is_the_one_that_the_library_takes(tmp_path: Path, model_type: str) -> None:
    config = {"model_type": model_type, "encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert"}}
    for number, (file, name) in enumerate([("", ""), *product(("tokenizer_config.json", "config.json"), NAMES)]):
        model, step = models()[number % 4], STEPS[number % 3 == 2]
        contents: dict[str, dict[str, Any]] = {
            "tokenizer.json": {**BARE, "pre_tokenizer": step, "model": model},
            "config.json": config,
            "tokenizer_config.json": {},
        }
        if file:
            contents[file] = {**contents[file], "tokenizer_class": name}
        for written, content in contents.items():
            (tmp_path / written).write_text(json.dumps(content))
        raw = (tmp_path / "tokenizer.json").read_bytes()
        known = tokenizer_class(contents["config.json"], contents["tokenizer_config.json"], raw)
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
            found = type(loaded).__name__ if loaded(TEXT)["input_ids"] else None
        except Exception:  # classes raise anything for a file that is none of theirs
            found = None
        assert known is not None
        expected = None if known.problem(model["type"], tmp_path) else known.name
        assert found == expected, (file, name, model["type"], step)


@pytest.mark.parametrize("name", ["T5Tokenizer", "BertTokenizerLegacy", "AutoTokenizer", "PreTrainedTokenizerFast"])
def test_the_table_of_tokenizers_is_what_the_library_says_today(name: str) -> None:
    assert tokenizer_table()["classes"][name] == class_entry(name)
