"""Outlines of checkpoints that lie elsewhere: small files whole, and weight files as their headers alone.

Weight files have their true size but, as sparse files, no weights, so that `inspect_checkpoint` finds in an outline
what it would find in the checkpoint itself.
"""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from worker.engine.catalog.checkpoints.files import ADAPTER_PICKLE, PICKLES, WEIGHTS, described_files, weights_among
from worker.engine.catalog.checkpoints.limits import MAX_DESCRIPTION_BYTES, MAX_HEADER_BYTES
from worker.engine.catalog.checkpoints.pointers import BEGINNING
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

PREFIX = struct.Struct("<Q")

Read = Callable[[str, int, int], bytes]
"""Returns the bytes of a file from one place to another."""


def write_outline(source: str, sizes: Mapping[str, int], folder: Path, read: Read) -> None:
    """Write the outline of a checkpoint whose files have these sizes.

    Raises:
        InvalidCheckpoint: its descriptions are larger than any are.
    """
    described = described_files(sizes)
    whole = [name for name in described if not name.endswith(WEIGHTS)]
    for name in described:
        (folder / name).parent.mkdir(exist_ok=True)
    if sum(sizes[name] for name in whole) > MAX_DESCRIPTION_BYTES:
        problem = f"configuration, tokenizer and index are larger than {MAX_DESCRIPTION_BYTES} bytes"
        raise InvalidCheckpoint(source, problem)
    for name in whole:
        (folder / name).write_bytes(read(name, 0, sizes[name]))
    of_modules = [name for name in described if name.endswith(WEIGHTS)]
    for name in (*weights_among(sizes, lambda name: (folder / name).read_bytes()), *of_modules):
        write_header(name, sizes[name], folder, read)
    for name in (*PICKLES, ADAPTER_PICKLE):
        if name in sizes:
            (folder / name).touch()


def write_header(name: str, size: int, folder: Path, read: Read) -> None:
    """Write a safetensors file's header, in a sparse file of its true size."""
    with (folder / name).open("wb") as stream:
        start = read(name, 0, min(BEGINNING, size))
        stream.write(start)
        header = PREFIX.unpack_from(start)[0] if len(start) >= PREFIX.size else 0
        if header <= MAX_HEADER_BYTES:
            end = min(PREFIX.size + header, size)
            stream.write(read(name, len(start), end))
        stream.truncate(size)
