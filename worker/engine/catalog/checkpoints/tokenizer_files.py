"""Reads tokenizers from their files: what their tokens are, and whether two are the same."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.files import SENTENCEPIECE, VOCABULARIES, size_limit
from worker.engine.catalog.checkpoints.growth import check_growth
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.json_files import read_file, read_json
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

MAX_VOCABULARIES = 64  # number that is remembered, a few hundred bytes each
_vocabularies: dict[tuple[tuple[str, bytes], ...], tuple[Mapping[str, str], int | None]] = {}
SPECIAL_TOKENS = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys of `tokenizer_config.json` and `special_tokens_map.json` whose values are several tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's tokens, and the rules that must agree for the tokens of two tokenizers to mean the same."""

    kind: str
    """Type of the tokenizer's model: `BPE`, `WordPiece`, `Unigram` or `WordLevel`."""
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    """Added tokens, each with the entry of tokenizer.json's `added_tokens` that says how it is found in text."""
    merges: tuple[tuple[str, str], ...]
    """Pairs of pieces that a BPE merges, in order."""
    scores: Mapping[str, float]
    """Log probabilities of a Unigram's pieces."""
    special: Mapping[str, str]
    """Special tokens by role, such as `pad_token`; roles that no file names are missing."""
    affixes: tuple[str, str]
    """Prefix of a piece that continues a word, and suffix of one that ends it."""


def read_tokenizer(info: CheckpointInfo) -> Tokenizer | None:
    """Read a tokenizer from the files of `CheckpointInfo.vocabulary`; None where no file has tokens with their ids.

    Raises:
        InvalidCheckpoint: a file is malformed.
    """
    path, source = info.tokenizer_path, info.source
    try:
        if (path / "tokenizer.json").exists():
            return _fast_tokenizer(path, source)
        return _slow_tokenizer(path, source)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InvalidCheckpoint(source, f"its tokenizer's files are malformed: {error}") from error


def _fast_tokenizer(path: Path, source: str) -> Tokenizer:
    content = read_json(path / "tokenizer.json", source, MAX_TOKENIZER_BYTES)
    model = content["model"]
    vocabulary, merges = model["vocab"], model.get("merges") or []
    by_kind = {isinstance(vocabulary, list): "Unigram", "merges" in model: "BPE"}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("tokenizer.json has a merge that is no pair")
    scores = {} if isinstance(vocabulary, dict) else {token: float(score) for token, score in vocabulary}
    known = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
    unknown = model.get("unk_token")
    kind = str(model.get("type") or by_kind.get(True, "WordPiece"))  # older files do not say
    absent = {"continuing_subword_prefix": "##"} if kind == "WordPiece" else {}
    affixes = [model.get(key, absent.get(key)) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    return Tokenizer(
        kind=kind,
        ids=_ids({**{token: entry["id"] for token, entry in added.items()}, **known}),
        added=added,
        merges=tuple((str(left), str(right)) for left, right in pairs),
        scores=scores,
        special={**({"unk_token": unknown} if isinstance(unknown, str) else {}), **_special_tokens(path, source)},
        affixes=(affixes[0] or "", affixes[1] or ""),
    )


def _slow_tokenizer(path: Path, source: str) -> Tokenizer | None:
    tokens = _tokens(path, source)
    if tokens is None:
        return None
    vocabulary, merges, added = tokens
    is_bpe = (path / "merges.txt").exists() and not (path / "vocab.txt").exists()
    return Tokenizer(
        kind="BPE" if is_bpe else "WordPiece",
        ids=_ids({**added, **vocabulary}),
        added={token: {"content": token} for token in added},
        merges=tuple((left, right) for left, right in (merge.split(" ") for merge in merges)),
        scores={},
        special=_special_tokens(path, source),
        affixes=("" if is_bpe else "##", ""),
    )


def _ids(ids: dict[Any, Any]) -> dict[str, int]:
    for token, index in ids.items():
        if not isinstance(token, str) or type(index) is not int or index < 0:
            raise ValueError(f"token {token!r} has the id {index!r}")
    return ids


def _special_tokens(path: Path, source: str) -> dict[str, str]:
    found = {}
    for file in (path / "special_tokens_map.json", path / "tokenizer_config.json"):
        content = read_json(file, source, MAX_CONFIG_BYTES) if file.exists() else {}
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def vocabulary_of(path: Path, source: str) -> tuple[dict[str, str], int | None]:
    """Return the digests of a vocabulary by the form it is stored in, and its last id if the files tell it.

    The last id counts tokens that the files beside the vocabulary name and that it lacks, because tokenizers add them.
    The digest `tokens` is that of the pairs token → id, with a BPE's merges or a Unigram's scores; formatting and
    post-processing do not matter. The digest `sentencepiece` is that of the file, whose pieces have ids only once a
    tokenizer's class has shifted them. Models that are merged usually have the same tokenizer, so results are
    remembered by the bytes of the files.
    """
    names = [name for name in VOCABULARIES if (path / name).exists()]
    contents = {name: read_file(path / name, source, size_limit(name)) for name in names}
    named = _named_tokens(path, source)
    key = (
        *((name, hashlib.sha256(content).digest()) for name, content in contents.items()),
        ("", hashlib.sha256(json.dumps(named).encode()).digest()),
    )
    if key not in _vocabularies:
        found = _vocabulary_of(path, source, contents, named)
        if len(_vocabularies) >= MAX_VOCABULARIES:
            del _vocabularies[next(iter(_vocabularies))]
        _vocabularies[key] = found
    forms, last = _vocabularies[key]
    return dict(forms), last


def _named_tokens(path: Path, source: str) -> list[str]:
    """Return the tokens that the files beside a vocabulary name, each once.

    As in transformers, `special_tokens_map.json` and `added_tokens.json` count if `tokenizer_config.json` does not list
    added tokens.
    """
    contents = {
        name: read_json(path / name, source, MAX_CONFIG_BYTES) if (path / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    }
    config, older, added = contents.values()
    decoder = config.get("added_tokens_decoder")
    named: list[Any] = list(decoder.values()) if isinstance(decoder, dict) else []
    said = config
    if "added_tokens_decoder" not in config:
        said = {**config, **older}
        named += added
    named += (token for key, token in said.items() if key.endswith("_token"))
    for key in TOKEN_LISTS:
        tokens = said.get(key)
        named += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return list(dict.fromkeys(text for text in texts if isinstance(text, str)))


def _vocabulary_of(
    path: Path, source: str, contents: Mapping[str, bytes], named: Collection[str]
) -> tuple[Mapping[str, str], int | None]:
    forms, last = {}, None
    tokens = _tokens(path, source)
    if tokens is not None:
        forms["tokens"] = json.dumps(tokens, sort_keys=True).encode()
        vocabulary, _, added = tokens
        known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        last = max((index for index in (*known.values(), *added.values()) if type(index) is int), default=None)
        if last is not None:
            last += sum(token not in known and token not in added for token in named)
    for name in SENTENCEPIECE:
        if name in contents:
            forms["sentencepiece"] = contents[name]
    return {form: hashlib.sha256(content).hexdigest() for form, content in forms.items()}, last


def _tokens(path: Path, source: str) -> list[Any] | None:
    """Return a value that is the same for the same tokens, whichever file they are in; None where there is no file."""
    if (path / "tokenizer.json").exists():
        content = read_json(path / "tokenizer.json", source, MAX_TOKENIZER_BYTES)
        model = content.get("model")
        # If a text is in the place of the vocabulary, the library takes it for the name of a file, and opens it.
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
            raise InvalidCheckpoint(source, "tokenizer.json has no vocabulary of its own")
        try:
            check_growth(content)
        except ValueError as error:
            problem = f"tokenizer.json is refused: {error}; use the tokenizer of the original model"
            raise InvalidCheckpoint(source, problem, file="tokenizer.json") from error
        merges = model.get("merges") or []
        if not isinstance(merges, list):
            raise InvalidCheckpoint(source, "tokenizer.json has merges that are no list")
        # A merge is a pair, or, in older files, text with a space between.
        merges = [" ".join(map(str, merge)) if isinstance(merge, list) else merge for merge in merges]
        return [model["vocab"], merges, _added(content.get("added_tokens"), model["vocab"], source)]
    added_file = path / "added_tokens.json"
    added = read_json(added_file, source, MAX_CONFIG_BYTES) if added_file.exists() else {}
    if (path / "vocab.txt").exists():
        vocabulary = {token: index for index, token in enumerate(_lines(path / "vocab.txt", source))}
        return [vocabulary, [], _beyond(vocabulary, added)]
    if (path / "vocab.json").exists():
        merges = _lines(path / "merges.txt", source) if (path / "merges.txt").exists() else []
        vocabulary = read_json(path / "vocab.json", source, MAX_TOKENIZER_BYTES)
        merges = [merge for merge in merges if merge and not merge.startswith("#version")]
        return [vocabulary, merges, _beyond(vocabulary, added)]
    return None


def _added(entries: Any, vocabulary: Any, source: str) -> dict[str, Any]:
    """Return the added tokens of tokenizer.json that its vocabulary, a mapping or a list of pieces, does not have."""
    try:
        known = vocabulary if isinstance(vocabulary, dict) else {piece[0]: i for i, piece in enumerate(vocabulary)}
        return _beyond(known, {entry["content"]: entry["id"] for entry in entries or ()})
    except (TypeError, KeyError, IndexError) as error:
        raise InvalidCheckpoint(source, "tokenizer.json has a malformed vocabulary or added_tokens") from error


def _beyond(vocabulary: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    return {token: index for token, index in added.items() if vocabulary.get(token) != index}


def _lines(file: Path, source: str) -> list[str]:
    try:
        text = read_file(file, source, MAX_TOKENIZER_BYTES).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as UTF-8: {error}") from error
    return text.removesuffix("\n").split("\n")  # splitlines() would take some tokens for the end of a line
