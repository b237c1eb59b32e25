"""Checks that the files beside a model's weights load as its users load them, before a job is accepted.

The library of tokenizers reads `tokenizer.json` here as it does for transformers. In the settings beside it, and in
those of generation, the types of values are checked, which transformers does only when it loads them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.library import completed
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.checkpoints.token_tensors import vocabulary_size
from worker.engine.catalog.checkpoints.tokenizer_classes import TokenizerClass, tokenizer_class
from worker.engine.catalog.checkpoints.tokenizer_files import SPECIAL_TOKENS, TOKEN_LISTS
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, is_of_library
from worker.engine.catalog.primitives.paths import in_one_line

TEXT = "Some text, to see whether it can be read."
SIDES = ("left", "right")
CACHES = (
    "static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid",
    "offloaded_hybrid_chunked", "dynamic", "offloaded", "quantized", "paged",
)  # fmt: skip
"""Values of `cache_implementation` that transformers takes."""
MAX_REMEMBERED = 64  # digests of files that load, a few bytes each
SEGMENTS = "token_type_ids"
ENDS = ("add_bos_token", "add_eos_token")
"""Settings by which transformers itself makes the rules that put tokens around a text."""


@dataclass(frozen=True)
class Loaded:
    """What is known of a tokenizer.json that loads."""

    kind: str
    """Type of its model."""
    last_token: int
    """Highest id in a text and in a pair of texts, with the tokens that its rules put around them."""
    last_segment: int
    """Highest number of a segment, a token type, in these."""


_loadable: dict[bytes, Loaded] = {}


def check_companions(info: CheckpointInfo) -> None:
    """Check the files that are published beside the weights of a model: its tokenizer, and its settings of generation.

    Raises:
        InvalidCheckpoint: a file is refused; the message names it, the key and its value.
    """
    check_tokenizer(info)
    check_generation(info)


def check_generation(info: CheckpointInfo) -> None:
    """Check the settings of generation. Raises InvalidCheckpoint, which names the key and its value."""
    file = companions(info).get("generation_config.json")
    if file is not None:
        content = read_json(file, info.source, MAX_CONFIG_BYTES)
        _refuse(info, file.name, _problems_of_generation(content), "correct it, or remove the file")


def check_tokenizer(info: CheckpointInfo) -> None:
    """Check that a checkpoint's tokenizer loads.

    Raises:
        InvalidCheckpoint: a file is refused; the message names it, the key and its value.
    """
    _checked(info)


def _checked(info: CheckpointInfo) -> tuple[Mapping[str, Any], TokenizerClass | None, Loaded | None]:
    """Check a tokenizer; return its configuration, its class if it is known, and its tokenizer.json if it has one."""
    advice = "save the tokenizer anew by save_pretrained()"
    path = info.tokenizer_path
    contents: dict[str, dict[str, Any]] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        contents[name] = read_json(path / name, info.source, MAX_CONFIG_BYTES) if (path / name).exists() else {}
    config = contents["tokenizer_config.json"]
    _refuse(info, "tokenizer_config.json", _problems_of_config(config), advice)
    # A configuration's own list of added tokens takes precedence over older files.
    is_older = "added_tokens_decoder" not in config
    if is_older:
        named = contents["special_tokens_map.json"]
        _refuse(info, "special_tokens_map.json", _problems_of_tokens(named, _is_described), advice)
        if (path / "added_tokens.json").exists():
            added = read_json(path / "added_tokens.json", info.source, MAX_CONFIG_BYTES)
            problems = (f"{_short(token)} {_short(index)}" for token, index in added.items() if type(index) is not int)
            _refuse(info, "added_tokens.json", (f"{one}, which is no token's id" for one in problems), advice)
    raw, loaded = None, None
    if (path / "tokenizer.json").exists():
        reads(info.source, "tokenizer.json")
        raw = (path / "tokenizer.json").read_bytes()
    known = tokenizer_class(info.config, config, raw)
    if raw is not None:
        said = {**config, **contents["special_tokens_map.json"]} if is_older else config
        loaded = _loads(info, raw, said, is_older, is_rebuilt=known is not None and known.rebuilds)
    problem = known.problem(loaded.kind if loaded else None, path) if known is not None and info.vocabulary else None
    if known is not None and problem is not None:
        advice = "set tokenizer_class there to the class that saved it, or to PreTrainedTokenizerFast"
        loaded_as = f"by tokenizer_config.json and model_type, transformers loads its tokenizer as {known.name}"
        raise InvalidCheckpoint(info.source, f"{loaded_as}, {problem}; {advice}", file="tokenizer_config.json")
    return config, known, loaded


def check_run_tokenizer(info: CheckpointInfo) -> None:
    """Check that the tokenizer of a model that is run loads, and that the embedding matrix has a row for each id.

    Raises:
        InvalidCheckpoint: a file is refused, or ids or token types go beyond their matrices.
    """
    config, known, loaded = _checked(info)
    rows = vocabulary_size(info.config)
    if info.last_token is not None and rows is not None:
        check_ids(info, info.last_token, rows)
    if loaded is None or any(key in config for key in ENDS):
        return
    if rows is not None:
        check_ids(info, loaded.last_token, rows)
    types = completed(info.config).get("type_vocab_size")
    inputs = config.get("model_input_names") or (known.inputs if known is not None else ())
    if type(types) is int and types > 1 and SEGMENTS in inputs:  # with one type there are none to tell apart
        check_segments(info, loaded.last_segment, types)


def check_segments(info: CheckpointInfo, last: int, types: int) -> None:
    """Raise InvalidCheckpoint when the tokenizer numbers segments of a text beyond those of the model."""
    if last >= types:
        problem = f"its tokenizer gives the token type {last}, and its config.json has {types} (type_vocab_size)"
        raise InvalidCheckpoint(info.source, f"{problem}; save the tokenizer anew by save_pretrained()")


def check_ids(info: CheckpointInfo, last: int, rows: int) -> None:
    """Raise InvalidCheckpoint when the last id that the tokenizer gives is beyond the rows of the embedding matrix."""
    if last >= rows:
        problem = f"its tokenizer has ids up to {last}, its embedding matrix {rows} rows"
        advice = "resize the matrix, or take these tokens out of the tokenizer"
        raise InvalidCheckpoint(info.source, f"{problem}; {advice}")


def _refuse(info: CheckpointInfo, file: str, problems: Iterator[str], advice: str) -> None:
    for problem in problems:
        raise InvalidCheckpoint(info.source, f"{file} has {problem}; {advice}", file=file)


# --- tokenizer.json ---------------------------------------------------------------------------------------


def _loads(info: CheckpointInfo, raw: bytes, said: Mapping[str, Any], needs_added: bool, *, is_rebuilt: bool) -> Loaded:
    """Load tokenizer.json, and cut texts by it. A file that has loaded once is not loaded again.

    Args:
        raw: its content.
        said: the special tokens that the files beside it name.
        needs_added: whether added tokens are only read from it.
        is_rebuilt: whether the tokenizer's class builds another tokenizer from its tokens and the files beside it.
    """
    unknown = said.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    renames_unknown = is_rebuilt and "unk_token" in said
    asked = json.dumps([needs_added, renames_unknown, unknown]).encode()
    key = hashlib.sha256(asked + hashlib.sha256(raw).digest()).digest()
    if key in _loadable:
        return _loadable[key]
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        if needs_added and b'"added_tokens"' not in raw:
            raise ValueError("it has no added_tokens, and tokenizer_config.json no added_tokens_decoder")
        model = tokenizer.model
        if isinstance(model, tokenizers.models.WordPiece) and renames_unknown:
            model.unk_token = str(unknown)
        encoded = [tokenizer.encode(TEXT), tokenizer.encode(TEXT, TEXT)]
    except BaseException as error:  # the library has no exception of its own for files that it cannot read
        if not is_of_library(error):
            raise
        problem = f"tokenizer.json cannot be loaded: {in_one_line(error)}"
        if renames_unknown and "Missing [UNK]" in problem:
            problem += f", which tokenizer_config.json says is {_short(unknown)}"
        raise InvalidCheckpoint(info.source, problem, file="tokenizer.json") from error
    if len(_loadable) >= MAX_REMEMBERED:
        del _loadable[next(iter(_loadable))]
    _loadable[key] = Loaded(
        type(model).__name__,
        max((index for one in encoded for index in one.ids), default=0),
        max((index for one in encoded for index in one.type_ids), default=0),
    )
    return _loadable[key]


# --- settings ---------------------------------------------------------------------------------------------


def _problems_of_config(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a tokenizer_config.json."""
    yield from _wrong(config, "tokenizer_class", "no text", lambda value: isinstance(value, str))
    yield from _wrong(config, "model_max_length", "no number", _is_number)
    for key in ("padding_side", "truncation_side"):
        if key in config and config[key] not in SIDES:
            yield f"{key} {_short(config[key])}, which is neither left nor right"
    if "model_input_names" in config and not _is_list(config["model_input_names"], lambda one: isinstance(one, str)):
        yield f"model_input_names {_short(config['model_input_names'])}, which is no list of text"
    for key in ("do_lower_case", "tokenize_chinese_chars", "strip_accents", "add_prefix_space"):
        yield from _wrong(config, key, "neither true nor false", lambda value: isinstance(value, bool))
    if not isinstance(config.get("split_special_tokens", False), bool):
        yield f"split_special_tokens {_short(config['split_special_tokens'])}, which is neither true nor false"
    template = config.get("chat_template")
    if not isinstance(template, str | list | dict | None):
        yield f"chat_template {_short(template)}, which is no text"
    if isinstance(template, list) and not _is_list(template, _is_named_template):
        yield f"chat_template {_short(template)}, which is no list of templates with their names"
    yield from _problems_of_tokens(config, _is_typed)
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        yield f"added_tokens_decoder {_short(decoder)}, which is no object of tokens by their ids"
        return
    for index, token in decoder.items():
        if not index.isascii() or not index.isdigit() or not _is_described(token):
            yield f"added_tokens_decoder with {_short(index)}: {_short(token)}, which is no id with its token"


def _problems_of_tokens(content: Mapping[str, Any], is_object: Callable[[Any], bool]) -> Iterator[str]:
    """Yield the problems of values that should be special tokens.

    Args:
        is_object: tells whether an object is a token; in the older of two files it does not say so of itself.
    """
    for key in SPECIAL_TOKENS:
        yield from _wrong(content, key, "no token", lambda value: isinstance(value, str) or is_object(value))

    def is_token(value: Any) -> bool:
        return isinstance(value, str) or _is_typed(value)

    for key in TOKEN_LISTS:
        value = content.get(key)
        is_named = isinstance(value, dict) and all(map(is_token, value.values()))
        is_listed = key != "model_specific_special_tokens" and _is_list(value, is_token)
        if key == "extra_special_tokens" and is_object is _is_described:
            is_listed = _is_list(value, lambda one: isinstance(one, str) or _is_described(one))
        if value is not None and not is_named and not is_listed:
            yield f"{key} {_short(value)}, which are no tokens"


def _problems_of_generation(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a generation_config.json."""
    early = config.get("early_stopping")
    if not isinstance(early, bool | None) and early not in (0, 1, "never"):
        yield f"early_stopping {_short(early)}, which is neither true, false nor never"
    for key in ("max_new_tokens", "pad_token_id", "num_return_sequences"):
        yield from _wrong(config, key, "no number", _is_number)
    most = config.get("max_new_tokens")
    if most is not None and most <= 0:
        yield f"max_new_tokens {_short(most)}, which is no number above 0"
    cache = config.get("cache_implementation")
    if cache is not None and cache not in CACHES:
        yield f"cache_implementation {_short(cache)}; transformers takes {', '.join(CACHES)}"
    yield from _wrong(
        config, "suppress_tokens", "no list of tokens' ids", lambda value: _is_list(value, lambda one: type(one) is int)
    )
    yield from _wrong(config, "eos_token_id", "no token's id, and no list of them", _are_ids)
    beams, returned = config.get("num_beams"), config.get("num_return_sequences") or 1
    if beams in (None, 1):
        if returned > 1 and not config.get("do_sample"):
            yield f"num_return_sequences {_short(returned)}, and neither beams nor do_sample"
    elif _is_number(beams) and returned > beams:
        yield f"num_return_sequences {_short(returned)}, and num_beams {_short(beams)}"
    mark = config.get("watermarking_config")
    if mark is not None and not _is_watermark(mark):
        yield f"watermarking_config {_short(mark)}, which is none that transformers takes"


def _is_watermark(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    share, width = value.get("greenlist_ratio", 0.25), value.get("context_width", 1)
    return (
        value.keys() <= {"greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width"}
        and value.get("seeding_scheme", "lefthash") in ("selfhash", "lefthash")
        and _is_number(share)
        and 0 <= share <= 1
        and _is_number(width)
        and bool(width >= 1)
    )


def _wrong(config: Mapping[str, Any], key: str, what: str, is_right: Callable[[Any], bool]) -> Iterator[str]:
    value = config.get(key)
    if value is not None and not is_right(value):
        yield f"{key} {_short(value)}, which is {what}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


def _are_ids(value: Any) -> bool:
    return _is_list(value if isinstance(value, list) else [value], lambda one: type(one) is int and abs(one) < 1 << 63)


def _is_named_template(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and "template" in value


def _is_typed(value: Any) -> bool:
    """Return whether it is a token as configurations have them, with a key that says so."""
    return isinstance(value, dict) and value.get("__type") == "AddedToken" and _is_described(value)


def _is_described(value: Any) -> bool:
    """Return whether it is an object with a token's text and flags."""
    if not isinstance(value, dict) or not isinstance(value.get("content", ""), str):
        return False
    flags = (value.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"))
    return all(isinstance(flag, bool) for flag in flags)


def _short(value: object) -> str:
    return repr(value)[:100]
