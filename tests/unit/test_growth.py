"""How much longer a tokenizer's rules may make a text."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.growth import MAX_GROWTH, check_growth
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


def charsmap(text: str) -> str:
    return base64.b64encode(struct.pack("<I", 4) + bytes(4) + text.encode() + b"\0a\0").decode()


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def template(*texts: str, ids: int = 1) -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *({"Sequence": {"id": t, "type_id": 0}} for t in texts)]
    specials = {"<s>": {"id": "<s>", "ids": [0] * ids, "tokens": ["<s>"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": specials}


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ALBERT = sequence(
    replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
    {"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 18)}, replace(" {2,}", " ", "Regex"),
)  # fmt: skip

REAL: dict[str, dict[str, Any]] = {
    "Llama": {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
    "ALBERT": {"normalizer": ALBERT, "pre_tokenizer": sequence({"type": "WhitespaceSplit"}, METASPACE)},
    "BERT": {"normalizer": {"type": "BertNormalizer"}, "pre_tokenizer": {"type": "BertPreTokenizer"}},
    "GPT-2": {"pre_tokenizer": BYTES, "post_processor": sequence(BYTES, template("A"), key="processors")},
    "many rules": {"normalizer": sequence(*(replace(r"\s+", " ", "Regex") for _ in range(50)))},
    "nothing": {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None},
}


@pytest.mark.parametrize("case", REAL)
def test_rules_of_tokenizers_in_use_are_taken(case: str) -> None:
    check_growth(REAL[case])


SIXFOLD = [replace("e", "e" * 100)] * 6
UNTYPED = [{key: value for key, value in step.items() if key != "type"} for step in SIXFOLD]
GROWING: dict[str, dict[str, Any]] = {
    "replacements": {"normalizer": sequence(*SIXFOLD)},
    "replacements in sequences": {"normalizer": sequence(sequence(*SIXFOLD[:3]), sequence(*SIXFOLD[:3]))},
    "replacements without a type": {"normalizer": {"normalizers": UNTYPED}},
    "one long replacement": {"normalizer": replace("e", "e" * (MAX_GROWTH + 1))},
    "replacements of nothing": {"normalizer": sequence(*[replace("(?=e)", "e", "Regex")] * 40)},
    "replacements of any number": {"normalizer": sequence(*[replace("e*", "e", "Regex")] * 40)},
    "an empty pattern": {"normalizer": sequence(*[replace("", "e")] * 40)},
    "prefixes": {"normalizer": sequence(*[{"type": "Prepend", "prepend": "e" * 100}] * 3)},
    "a map of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 5000)}},
    "lower case and back": {"normalizer": sequence(*[replace("i", "İ"), {"type": "Lowercase"}] * 20)},
    "bytes of bytes": {"pre_tokenizer": sequence(*[BYTES] * 20, key="pretokenizers")},
    "text many times": {"post_processor": sequence(*[template("A", "A")] * 20, key="processors")},
    "many special tokens": {"post_processor": template("A", ids=5000)},
    "a decoder": {"decoder": sequence(*SIXFOLD, key="decoders")},
    "a long unknown token": {"model": {"unk_token": "x" * 5000}},
}


@pytest.mark.parametrize("case", GROWING)
def test_rules_that_make_a_text_much_longer_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"could make a text more than|characters; \d+ are allowed"):
        check_growth(GROWING[case])


def test_a_checkpoint_with_such_a_tokenizer_is_refused_by_its_file(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "expert")
    inspect_checkpoint(checkpoint, "local:expert")
    edit_json(checkpoint / "tokenizer.json", **json.loads(json.dumps(GROWING["replacements"])))
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json is refused: its normalizer") as caught:
        inspect_checkpoint(checkpoint, "local:expert")
    assert caught.value.detail["file"] == "tokenizer.json"
