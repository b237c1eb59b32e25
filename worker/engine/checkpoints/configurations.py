"""Makes configurations for libraries: with the keys that a model's own class knows, and none that steer loading.

A key that no class knows changes no model, yet libraries act on some: they select the files that hold the weights, the
kernels that run, or the values that are recomputed. An allow-list leaves none of these choices to the checkpoint.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import Any

from worker.engine.catalog.checkpoints.files import CHAT_TEMPLATES, TOKENIZER_FILES
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_LABELS
from worker.engine.catalog.checkpoints.tokenizer_files import TOKEN_LISTS
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.paths import in_one_line
from worker.engine.runtime.libraries import tokenization_auto, transformers

OFFLINE = {"local_files_only": True, "trust_remote_code": False}
"""Arguments by which the library loads anything without the network and without code of a checkpoint."""
SETTINGS = {
    "return_dict": True,
    "output_attentions": False,  # outputs cost time, and not every attention can give them
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,  # in chunks, the second projection would see parts of its input
}
"""Keys that the service sets itself, whatever a configuration says."""
SHARED_KEYS = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type",
        "is_encoder_decoder", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
        "per_layer_config", "tie_last_hidden_states", "tokenizer_class",
    }
)  # fmt: skip
"""Keys that the base class of all configurations takes and that describe the model."""
NEVER = frozenset({"gradient_checkpointing", "torchscript", "pruned_heads", "quantization_config", *SETTINGS})
"""Keys that some classes know but that control how a model is loaded or run."""
READ_BY_MODELS = re.compile(r"config\.([a-zA-Z]\w*)|config, ['\"]([a-zA-Z]\w*)['\"]")
TOKEN_KEYS = frozenset(TOKEN_LISTS)
TOKENIZER_KEYS = TOKEN_KEYS | {
    "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "chat_template",
    "clean_up_tokenization_spaces", "max_length", "model_input_names", "model_max_length", "padding_side",
    "pad_token_type_id", "spaces_between_special_tokens", "split_special_tokens", "stride", "tokenizer_class",
    "truncation_side", "truncation_strategy", "legacy", "use_default_system_prompt",
}  # fmt: skip
"""Keys of `tokenizer_config.json` that the base class of all tokenizers takes."""
PLACES = re.compile(
    r".*(_file|_files|_path|_dir|_object|_kwargs)|vocab|merges|name_or_path|backend|is_local|init_inputs"
)
"""Parameters of tokenizers' classes that name files, or that a configuration must not set."""


def library_config(config: Mapping[str, Any], source: str) -> Any:
    """Make the library's configuration object from a checkpoint's `config.json`.

    Raises:
        InvalidCheckpoint: the library takes no such configuration.
    """
    labels = config.get("num_labels")
    if isinstance(labels, int) and labels > MAX_LABELS:
        raise InvalidCheckpoint(source, f"config.json says {str(labels)[:20]} num_labels; {MAX_LABELS} are allowed")
    try:
        return transformers.AutoConfig.for_model(**{**known_keys(config), **SETTINGS})
    except Exception as error:  # the library raises various exceptions for values
        raise InvalidCheckpoint(source, f"transformers cannot load it: {in_one_line(error)}") from error


def known_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that the class of its `model_type` knows; inner configurations likewise."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return dict(config)  # the library that takes it refuses it
    return _known(config, transformers.CONFIG_MAPPING[model_type])


def _known(config: Mapping[str, Any], of: Any) -> dict[str, Any]:
    known = _keys_of(of)
    inner = getattr(of, "sub_configs", {})
    found = {}
    for key, value in config.items():
        if key not in known:
            continue
        if key in inner and isinstance(value, Mapping):
            value = _known(value, _inner_class(value, inner[key]))
        found[key] = value
    return found


def _inner_class(config: Mapping[str, Any], declared: Any) -> Any:
    """Return the class of an inner configuration: by its own `model_type` where the outer class leaves it open."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[model_type]
    return declared


@cache
def _keys_of(of: Any) -> frozenset[str]:
    """Return the keys that a configuration's class, or the models that are built from it, name in their code."""
    spellings = {*of.attribute_map, *of.attribute_map.values()}
    found = {field.name for field in fields(of)} | spellings | {*getattr(of, "sub_configs", ())}
    for owner in of.__mro__:
        if owner.__module__.startswith("transformers.models."):
            for member in vars(owner).values():
                code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
                found.update(_strings(code) if code else ())
            found |= _read_by_models(owner.__module__)
    return frozenset(name for name in found if not name.startswith("_")) - NEVER | SHARED_KEYS


def _strings(code: CodeType) -> Iterator[str]:
    """Yield the strings among a function's constants, including those of inner functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _strings(constant)
        for one in constant if isinstance(constant, tuple | frozenset) else (constant,):
            if isinstance(one, str) and one.isidentifier():
                yield one


def _read_by_models(module: str) -> set[str]:
    """Return the attributes of configurations that models in the same folder read, even if no class declares them."""
    folder = Path(sys.modules[module].__file__ or "").parent
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py")]
    return {name for text in texts for found in READ_BY_MODELS.finditer(text) for name in found.groups() if name}


@contextmanager
def tokenizer_folder(info: CheckpointInfo) -> Iterator[Path]:
    """Make a folder of the tokenizer's files for libraries, in which configurations only have allowed keys."""
    with TemporaryDirectory(prefix="maskmerge-tokenizer-") as name:
        folder = Path(name)
        for file_name in (*TOKENIZER_FILES, *CHAT_TEMPLATES):
            if (info.tokenizer_path / file_name).exists():
                (folder / file_name).symlink_to(info.tokenizer_path / file_name)
        for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = info.tokenizer_path / file_name
            if not file.exists():
                continue
            content = read_json(file, info.source, MAX_CONFIG_BYTES)
            known = (
                _tokenizer_keys(content.get("tokenizer_class")) if file_name == "tokenizer_config.json" else TOKEN_KEYS
            )
            kept = {key: value for key, value in content.items() if key in known or _is_token(key, value)}
            (folder / file_name).unlink()
            (folder / file_name).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        yield folder


def _is_token(key: str, value: Any) -> bool:
    """Return whether a key names a special token; models may have further ones of their own."""
    return key.endswith("_token") and (isinstance(value, str | dict) or value is None)


@cache
def _tokenizer_keys(name: Any) -> frozenset[str]:
    """Return keys of the base class, and parameters of the class of this name in the library, if it has one."""
    found = tokenization_auto.tokenizer_class_from_name(name) if isinstance(name, str) else None
    owners = found.__mro__ if isinstance(found, type) else ()
    names = {
        parameter
        for owner in owners
        if owner.__module__.startswith("transformers.") and "__init__" in vars(owner)
        for parameter in inspect.signature(vars(owner)["__init__"]).parameters
    }
    return frozenset(name for name in names if not PLACES.fullmatch(name)) | TOKENIZER_KEYS
