"""Reads the headers of safetensors files."""

import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.info import DTYPE_BYTES, TensorInfo
from worker.engine.catalog.checkpoints.json_files import parsed_json
from worker.engine.catalog.checkpoints.limits import MAX_HEADER_BYTES, MAX_NAME, MAX_RANK, MAX_SIZE, MAX_TENSORS
from worker.engine.catalog.checkpoints.pointers import BEGINNING, refuse_stand_in
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

# Data types of quantised weights, by the format's names.
QUANTISED = {"F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E4M3FNUZ": "float8", "F8_E5M2FNUZ": "float8"}
QUANTISED |= {"F8_E8M0": "float8", "F6_E2M3": "float6", "F6_E3M2": "float6", "F4": "float4"}
QUANTISED |= dict.fromkeys(("U16", "U32", "U64"), "packed")


def read_header(file: Path, source: str) -> Iterable[TensorInfo]:
    """Read the tensors of one safetensors file, in the order of their bytes.

    The format: 8 bytes little-endian header length, the header as JSON without repeated keys, then the tensors' bytes
    without gaps (https://huggingface.co/docs/safetensors, *Format*).

    Raises:
        InvalidCheckpoint: header too large, malformed, or not matching the file's size.
    """
    name = file.name
    reads(source, name)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(BEGINNING)
            refuse_stand_in(name, prefix, source)
            if len(prefix) < 8:
                raise InvalidCheckpoint(source, f"{name} is truncated: {size} bytes are no safetensors file", file=name)
            (header_bytes,) = struct.unpack_from("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                problem = (
                    f"{name} announces a header of {header_bytes} bytes, and {MAX_HEADER_BYTES} are allowed: "
                    f"its header is too large, or it is no safetensors file, since it begins with {prefix[:8]!r}"
                )
                raise InvalidCheckpoint(source, problem, file=name)
            stream.seek(8)
            raw = stream.read(header_bytes)
    except OSError as error:
        raise InvalidCheckpoint(source, f"{name} cannot be read: {error.strerror}", file=name) from error
    if len(raw) < header_bytes:
        raise InvalidCheckpoint(source, f"{name} is truncated inside its header", file=name)
    try:
        header = parsed_json(raw, object_pairs_hook=_unrepeated)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.get("__metadata__")
        is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        if metadata is not None and not is_text:
            raise ValueError("its __metadata__ is no object of texts")
        data = 8 + header_bytes
        entries = [_tensor(source, file, data, key, entry) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{name} has a malformed header: {error}", file=name) from error
    if len(entries) > MAX_TENSORS:
        raise InvalidCheckpoint(source, f"{name} has {len(entries)} tensors; {MAX_TENSORS} are allowed", file=name)
    entries.sort(key=lambda item: item[1])
    position = 0
    for tensor, begin, end in entries:
        if begin != position or end - begin != tensor.nbytes:
            raise InvalidCheckpoint(
                source, f"{name}: tensor {tensor.name} has offsets [{begin}, {end}] that do not fit its shape and place"
            )
        position = end
    expected = 8 + header_bytes + position
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise InvalidCheckpoint(
            source,
            f"{name} is {state}: its header describes {expected} bytes, the file has {size}; copy it again",
            file=name,
        )
    return [tensor for tensor, _, _ in entries]


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object. Raises ValueError for a repeated key: readers differ in which of its values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the key '{name[:MAX_NAME]}' twice")
    return found


def _tensor(source: str, file: Path, data: int, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """Read one entry of a header. Raises ValueError for an entry that the format does not allow."""
    if not isinstance(entry, dict):
        raise ValueError(f"what it says of tensor {name[:MAX_NAME]} is no JSON object")
    if len(name) > MAX_NAME:
        raise ValueError(f"the name of tensor {name[:40]}… has {len(name)} characters; {MAX_NAME} are allowed")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise ValueError(f"tensor {name} has no {key}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {name} has a dtype that is no string")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has a shape that is no list, or data_offsets that are not a list of two")
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name} has {len(shape)} axes; {MAX_RANK} are allowed")
    if dtype in QUANTISED:
        kind = QUANTISED[dtype]
        problem = f"{file.name}: tensor {name} has dtype {dtype}; {kind} weights are quantised"
        raise InvalidCheckpoint(source, f"{problem}: merge the originals, then quantise", tensor=name)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has dtype {dtype[:20]}; supported are {', '.join(DTYPE_BYTES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):  # True is an instance of int
        raise ValueError(f"tensor {name} has a negative or non-integer shape or offset")
    if max(*shape, *offsets) > MAX_SIZE:
        raise ValueError(f"tensor {name} has a shape or an offset larger than {MAX_SIZE}")
    begin, end = offsets
    return TensorInfo(source, name, file, data + begin, dtype, tuple(shape)), begin, end
