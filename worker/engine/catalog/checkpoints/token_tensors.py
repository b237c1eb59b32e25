"""Tells which tensors have a row for each token, and what a configuration says of tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.tensor_names import EMBEDDINGS, OUTPUT_EMBEDDINGS, ends_with, layer_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

TOKEN_INDEXED = (
    *EMBEDDINGS,
    *OUTPUT_EMBEDDINGS,
    *(f"{name.removesuffix('.weight')}.bias" for name in OUTPUT_EMBEDDINGS),
    "cls.predictions.bias",
    "embed_tokens_per_layer.weight",
)
"""Ends of names of tensors with a row for each token."""
COMMON_NAMES = ("embeddings.weight", "decoder.weight", "decoder.bias", "proj_out.weight", "proj_out.bias")
"""Ends among them that other tensors have too, which have nothing to do with tokens."""
POSITIONS = re.compile(r"position|wpe")
"""Parts of names of tensors with a row for each position, of which there may be as many."""


def is_token_indexed(name: str, shape: Sequence[int], rows: int) -> bool:
    """Return whether the tensor has a row for each token: an input embedding, or a language model's head.

    Args:
        rows: number of rows of the model's embedding matrix. A tensor that has another number of rows and one of the
            `COMMON_NAMES` has no rows of tokens.
    """
    if layer_of(name) is not None or not ends_with(name, TOKEN_INDEXED):
        return False
    return tuple(shape[:1]) == (rows,) or not ends_with(name, COMMON_NAMES)


def check_rows(info: CheckpointInfo, tensor: TensorInfo) -> None:
    """Raise InvalidCheckpoint where a token-indexed tensor has another number of rows than the configuration says."""
    rows = vocabulary_size(info.config)
    if tensor.shape[:1] != (rows,):
        problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, config.json says vocab_size {rows}"
        raise InvalidCheckpoint(info.source, problem, tensor=tensor.name)


def check_names_tell_tokens(info: CheckpointInfo) -> None:
    """Check an architecture without a table, whose token-indexed tensors are only known by their names.

    Raises:
        InvalidCheckpoint: another tensor may have a value for each token, which would be merged with other tokens'.
    """
    rows = vocabulary_size(info.config)
    for tensor in info.tensors.values():
        name, shape = tensor.name, list(tensor.shape)
        if rows is None or rows not in shape or is_token_indexed(name, shape, rows):
            continue
        if layer_of(name) is not None or POSITIONS.search(name):
            continue
        problem = f"tensor {name} of shape {shape} seems to have a value for each of {rows} tokens, by an unknown name"
        raise InvalidCheckpoint(info.source, f"{problem}; its vocabulary must be that of the others", tensor=name)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the embedding matrix; None where the configuration does not say."""
    for part in (config, config.get("text_config")):
        rows = part.get("vocab_size") if isinstance(part, Mapping) else None
        if type(rows) is int and rows > 0:
            return rows
    return None


def matrix_rows(info: CheckpointInfo) -> int:
    """Return the number of rows of all token-indexed tensors. Raises InvalidCheckpoint where it is not one number."""
    rows = vocabulary_size(info.config)
    if rows is None:
        raise InvalidCheckpoint(info.source, "config.json has no usable vocab_size")
    for tensor in info.tensors.values():
        if is_token_indexed(tensor.name, tensor.shape, rows):
            check_rows(info, tensor)
    return rows


def token_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that follow from the vocabulary, with inner keys after a dot.

    The id of padding is not among them, because positions may be counted from it.
    """
    for key in config:
        if key == "vocab_size" or (key.endswith("_token_id") and key != "pad_token_id"):
            yield key
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        yield from (f"text_config.{key}" for key in token_keys(inner))
