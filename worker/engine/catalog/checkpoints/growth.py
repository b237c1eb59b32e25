"""Limits how much longer a tokenizer can make a text: a few hundred bytes of rules could make it exceed all memory."""

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from typing import Any

MAX_GROWTH = 3000  # the longest sequences of steps in use, ALBERT's and XLNet's, reach 1300 in the worst text
MAX_AFFIX = 1000  # characters that are put before, after or in place of each piece
GROWTH_OF_KINDS = {"NFKC": 18, "NFKD": 18, "NFC": 4, "NFD": 4, "BertNormalizer": 12, "ByteLevel": 4}
GROWTH_OF_KINDS |= {"Lowercase": 2, "Metaspace": 2}
"""Largest number of characters that one can become, by the type of a step."""
TAKES_A_CHARACTER = re.compile(r"(?:[^\\()\[\]{}*?|^$.]|\\[sSdDwWnrt.]|\.|\[[^\\\[\]&^]+\]|\{[1-9][0-9]*,?[0-9]*\})+")
"""Matches patterns that certainly match no empty text."""


def check_growth(content: Mapping[str, Any]) -> None:
    """Raise ValueError if the rules of a `tokenizer.json` can make a text much longer, or repeat long tokens."""
    text = _growth(content.get("normalizer")) * _growth(content.get("pre_tokenizer"))
    for part, growth in (
        ("normalizer and pre_tokenizer", text),
        ("post_processor", _growth(content.get("post_processor"))),
        ("decoder", _growth(content.get("decoder"))),
    ):
        if growth > MAX_GROWTH:
            raise ValueError(f"its {part} could make a text more than {MAX_GROWTH} times as long")
    model = content.get("model")
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        affix = model.get(key) if isinstance(model, dict) else None
        if isinstance(affix, str) and len(affix) > MAX_AFFIX:
            raise ValueError(f"its model's {key} has {len(affix)} characters; {MAX_AFFIX} are allowed")


def _growth(step: Any) -> float:
    """Return the largest factor by which a step lengthens a text; 1 for malformed steps, which the library refuses."""
    if not isinstance(step, dict):
        return 1
    kind = step.get("type", "Sequence" if any(isinstance(value, list) for value in step.values()) else None)
    growth: float = 1
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        inner = step.get(key)
        for one in inner if isinstance(inner, list) else ():
            growth = min(growth * _growth(one), MAX_GROWTH + 1)
    # Steps are recognised by their keys, because the library also takes steps without a type.
    if "pattern" in step and "content" in step:
        return growth * _of_replace(step["pattern"], step["content"])
    if "prepend" in step:
        return growth * (1 + len(_text(step["prepend"])))
    if "precompiled_charsmap" in step:
        return growth * _of_map(step["precompiled_charsmap"])
    if "single" in step or "pair" in step:
        return growth * max(_of_template(step, step.get(form)) for form in ("single", "pair"))
    return growth * _of_kind(kind)


def _of_kind(kind: Any) -> int:
    if kind is None:
        return max(GROWTH_OF_KINDS.values())
    return GROWTH_OF_KINDS.get(kind, 1) if isinstance(kind, str) else 1


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _of_replace(pattern: Any, content: Any) -> float:
    found = pattern if isinstance(pattern, dict) else {"String": pattern}
    length = len(_text(content))
    if isinstance(found.get("String"), str) and found["String"]:
        return max(1, length / len(found["String"]))
    takes_one = TAKES_A_CHARACTER.fullmatch(_text(found.get("Regex")))
    return max(1, length) if takes_one else 1 + length


def _of_map(charsmap: Any) -> int:
    """Return the length of the longest text that replaces a character.

    SentencePiece's format is a trie's size, the trie, then the texts.
    """
    try:
        raw = base64.b64decode(_text(charsmap))
        (size,) = struct.unpack_from("<I", raw)
    except (binascii.Error, ValueError, struct.error):
        return 1
    texts = raw[4 + size :].split(b"\0")
    return max(1, max(len(text.decode(errors="ignore")) for text in texts))


def _of_template(step: Mapping[str, Any], pieces: Any) -> int:
    """Return how often a template has a text, plus the number of tokens that it adds."""
    specials = step.get("special_tokens")
    growth = 0
    for piece in pieces if isinstance(pieces, list) else ():
        special = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        entry = specials.get(name) if isinstance(name, str) and isinstance(specials, dict) else None
        ids = entry.get("ids") if isinstance(entry, dict) else None
        growth += len(ids) if isinstance(ids, list) else 1
    return max(1, growth)
