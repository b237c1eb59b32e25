"""Reads a checkpoint's description (config, tensor names, dtypes, shapes) without reading a weight.

A checkpoint is a folder as `save_pretrained` writes it: `config.json`, and `model.safetensors` or
`model.safetensors.index.json` with its shards. See `adapters` for adapters. Nothing here unpickles or runs anything;
sizes are checked before anything is parsed.
"""

import errno
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.descriptions import check_folder, without_code
from worker.engine.catalog.checkpoints.files import (
    ADAPTER_CONFIG,
    INDEX,
    PICKLES,
    SAFETENSORS,
    WEIGHTS,
    described_files,
    file_names,
    is_shard,
)
from worker.engine.catalog.checkpoints.headers import read_header
from worker.engine.catalog.checkpoints.info import DTYPE_BYTES, FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.json_files import read_json
from worker.engine.catalog.checkpoints.library import decoded
from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, MAX_WEIGHT_FILES
from worker.engine.catalog.checkpoints.tokenizer_files import vocabulary_of
from worker.engine.catalog.families import backbone_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
"""The system's error numbers when this process or the machine may open no more files."""
PACKED = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|absmax|quant_map|SCB|weight_scale|weight_scale_inv)(\.|$)")
"""Names of parts of quantised weights in GPTQ, AWQ, compressed-tensors and bitsandbytes."""
INTEGERS_THAT_PACK = ("I32", "I16", "I8", "U8")


def inspect_checkpoint(path: Path, source: str) -> CheckpointInfo:
    """Read config and headers of a whole model's checkpoint folder.

    Args:
        path: the folder; a view, see `views`, where the checkpoint comes from outside.

    Raises:
        InvalidCheckpoint: a file or tensor is refused; the message names it and says what to do.
    """
    with readable(source):
        return _inspect(path, source)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn the system's errors about files into InvalidCheckpoint."""
    try:
        yield
    except OSError as error:  # a name too long, links in a circle
        if error.errno in TOO_MANY_OPEN:
            raise
        raise InvalidCheckpoint(source, f"cannot be read: {error.strerror}") from error


def _inspect(path: Path, source: str) -> CheckpointInfo:
    check_folder(path, source)
    if (path / ADAPTER_CONFIG).exists():
        raise InvalidCheckpoint(source, f"it is an adapter ({ADAPTER_CONFIG}); only the models of a merge may be")
    config = decoded(read_json(path / "config.json", source, MAX_CONFIG_BYTES))
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise InvalidCheckpoint(source, f"config.json has model_type {repr(kind)[:100]}, which is no text")
    config, notes = without_code(config, source)
    tensors: dict[str, TensorInfo] = {}
    files, indexed = weight_files(path, source, config)
    for file_name in files:
        for tensor in read_header(path / file_name, source):
            if tensor.name in tensors:
                raise InvalidCheckpoint(
                    source, f"tensor {tensor.name} is in both {tensors[tensor.name].file} and {file_name}"
                )
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise InvalidCheckpoint(source, f"it has more than {MAX_TENSORS} tensors", file=file_name)
    for name, file_of in indexed.items():
        if name not in tensors:
            problem = f"{INDEX} says that tensor {name} is in {file_of}, and no weight file has it"
            raise InvalidCheckpoint(source, problem, tensor=name)
    tensors = unstacked(tensors, config.get("model_type"), source)
    if config.get("quantization_config") and not any(map(_may_be_packed, tensors.values())):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        notes += (f"config.json of {source} has a quantization_config though its weights are plain: it was left out",)
    vocabulary, last = vocabulary_of(path, source)
    return CheckpointInfo(source, path, config, tensors, vocabulary, path, last_token=last, notes=notes)


def unstacked(tensors: dict[str, TensorInfo], model_type: str | None, source: str) -> dict[str, TensorInfo]:
    """Take matrices of all experts in one tensor apart, as if each expert's were a tensor of the file.

    Each is one run of bytes there. What is in such layers besides gets the name that files without such tensors have.
    So checkpoints fit each other whichever form they are stored in.
    """
    family = backbone_of(model_type or "")
    if family is None or not family.stacked:
        return tensors
    found: dict[str, TensorInfo] = {}
    for tensor in tensors.values():
        names = family.unstacked(tensor.name)
        parts = [replace(tensor, name=family.in_files(tensor.name))] if names is None else _of_experts(tensor, names)
        for part in parts:
            if part.name in found:
                raise InvalidCheckpoint(source, f"tensor {part.name} is there under two spellings", tensor=part.name)
            found[part.name] = part
        if len(found) > MAX_TENSORS:
            raise InvalidCheckpoint(source, f"its experts have more than {MAX_TENSORS} tensors")
    return found


def _of_experts(stacked: TensorInfo, names: Sequence[str]) -> list[TensorInfo]:
    """Return the tensors that (experts, rows, columns) holds: for each expert one after another, of equally many rows.

    Args:
        names: their names, with `{expert}` for its number.
    """
    shape = stacked.shape
    if len(shape) != 3 or shape[1] % len(names) or not 0 < shape[0] * len(names) <= MAX_TENSORS:
        problem = f"tensor {stacked.name} has shape {list(shape)}, which is none of {len(names)} matrices an expert"
        raise InvalidCheckpoint(stacked.source, problem, tensor=stacked.name)
    rows, columns = shape[1] // len(names), shape[2]
    size = rows * columns * DTYPE_BYTES[stacked.dtype]
    return [
        replace(
            stacked,
            name=name.format(expert=expert),
            shape=(rows, columns),
            offset=stacked.offset + (expert * len(names) + place) * size,
        )
        for expert in range(shape[0])
        for place, name in enumerate(names)
    ]


def is_packed(tensor: TensorInfo) -> bool:
    """Return whether a tensor is part of quantised weights: integers named as a weight, or their scales and so on."""
    return PACKED.search(tensor.name) is not None or (
        tensor.dtype not in FLOATS and (tensor.name == "weight" or tensor.name.endswith(".weight"))
    )


def _may_be_packed(tensor: TensorInfo) -> bool:
    """Return whether a tensor may be part of quantised weights, if a configuration says that there are some."""
    return is_packed(tensor) or tensor.dtype in INTEGERS_THAT_PACK


def checkpoint_state(info: CheckpointInfo) -> str:
    """Return a digest of the names, sizes and times of the checkpoint's own files, which changes when one is written.

    Raises:
        InvalidCheckpoint: a file is gone.
    """
    digest = hashlib.sha256()
    try:
        for name in (*described_files({*file_names(info.path)}), *info.weight_files):
            stat = (info.path / name).stat()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    except OSError as error:
        raise InvalidCheckpoint(info.source, f"{Path(error.filename).name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def weight_files(path: Path, source: str, config: Mapping[str, Any]) -> tuple[list[str], Mapping[str, object]]:
    """Return the names of the weight files, see `weights_among`, and each tensor's file according to the index."""
    if (path / WEIGHTS).is_file():
        return [WEIGHTS], {}
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX, source, MAX_HEADER_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidCheckpoint(source, f"{INDEX} has no weight_map")
        files = sorted({str(file) for file in weight_map.values()})
        if len(files) > MAX_WEIGHT_FILES:
            raise InvalidCheckpoint(source, f"{INDEX} names {len(files)} files; {MAX_WEIGHT_FILES} are allowed")
        for file in files:
            if not file.endswith(SAFETENSORS):
                problem = f"{INDEX} names {file[:100]}, and by its name that is no {SAFETENSORS} file"
                raise InvalidCheckpoint(source, f"{problem}; others are not opened, since they may be pickles")
            if not is_shard(file) or not (path / file).is_file():
                raise InvalidCheckpoint(source, f"{INDEX} names {file}, which is not in the folder")
        return files, weight_map
    for pickle in PICKLES:
        if (path / pickle).exists():
            raise InvalidCheckpoint(
                source,
                f"{pickle} is there but no {WEIGHTS}; pickle files are not opened. Convert it where you trust it: "
                f'python -c "from transformers import {use_of(config).auto_class} as A; '
                "A.from_pretrained('IN').save_pretrained('OUT')\"",
            )
    raise InvalidCheckpoint(source, f"neither {WEIGHTS} nor {INDEX} is there")
