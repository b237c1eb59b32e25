"""Compares written weight files with what was merged in memory, a part of a file at a time."""

import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.engine.catalog.primitives.errors import StorageError
from worker.engine.runtime.threads import in_threads

READ_BYTES = 1 << 18  # each part is read into the same memory, which stays in a cache


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor in a written file."""

    name: str
    start: int
    """Position of its first byte in the file."""
    end: int
    checksum: int
    """CRC-32 of its bytes, taken of the merged values in memory."""


@dataclass(frozen=True)
class WrittenFile:
    """A weight file as it was meant to be written."""

    path: Path
    sha256: str
    """Digest of the file, in hexadecimal, read from the file while it was written."""
    header: bytes
    tensors: Sequence[WrittenTensor]
    """Tensors in the order of the file, which they fill."""


def check_written(files: Iterable[WrittenFile], folder: Path, threads: int) -> None:
    """Check that every file has the bytes that were merged in memory: the header, every tensor, and nothing else.

    Args:
        folder: the artifact's folder, from which messages name files.
        threads: number of threads, each of which reads one tensor at a time.

    Raises:
        StorageError: a file cannot be read, or has other bytes.
    """
    for file in files:
        name = file.path.relative_to(folder).as_posix()
        try:
            _check(file, name, threads)
        except OSError as error:
            raise StorageError(
                f"{name} cannot be read back after it was written: {error.strerror}", file=name
            ) from error


def _check(file: WrittenFile, name: str, threads: int) -> None:
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        end = file.tensors[-1].end if file.tensors else len(file.header)
        if os.fstat(descriptor).st_size != end:
            raise _differs(name, "another size")
        if os.pread(descriptor, len(file.header), 0) != file.header:
            raise _differs(name, "another header")

        def check(tensor: WrittenTensor) -> None:
            if _checksum(descriptor, tensor) != tensor.checksum:
                raise _differs(name, f"other values of tensor {tensor.name}", tensor=tensor.name)

        in_threads(check, file.tensors, threads, lambda: None)
    finally:
        os.close(descriptor)


def _checksum(descriptor: int, tensor: WrittenTensor) -> int:
    """Return the checksum of a tensor's bytes in the file, or of those that are left of them."""
    buffer = memoryview(bytearray(min(READ_BYTES, tensor.end - tensor.start)))
    found, position = 0, tensor.start
    while position < tensor.end:
        count = os.preadv(descriptor, [buffer[: tensor.end - position]], position)
        if count == 0:
            break
        found = zlib.crc32(buffer[:count], found)
        position += count
    return found


def _differs(name: str, what: str, **detail: str) -> StorageError:
    problem = f"{name} is not what was merged: the file has {what}"
    return StorageError(f"{problem}. Nothing is published; check the worker's disk, and try again", file=name, **detail)
