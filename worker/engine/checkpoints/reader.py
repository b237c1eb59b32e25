"""Tensors of checkpoints, read where they lie, a run of rows at a time."""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.headers import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    TOO_MANY_OPEN,
    CheckpointInfo,
    TensorInfo,
)
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.runtime.threads import in_threads

CLOCK_TICK_NS = 1_000_000_000  # a file that was written just now may be written again and have the same times
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorReader:
    """Opens each weight file once, while in context. Threads may share it.

    Files are read, not mapped: what is read counts as memory of the process no longer than it is held.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, tensor: TensorInfo, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows: (rows, *tensor.shape[1:]).

        As it is stored in its own dtype; one that an adapter adds to in float32, or float64 where one of both is.

        Args:
            rows: start and stop along the first axis, of a tensor that has one.

        Raises:
            InvalidCheckpoint: the file is no longer what its header said.
            OSError: as many files are open as this process may have.
        """
        if tensor.delta is None:
            return self._stored(tensor, rows)
        [found] = self.read_runs(tensor, [rows or slice(0, tensor.shape[0])])
        return found

    def read_runs(self, tensor: TensorInfo, runs: Iterable[slice]) -> Iterator[Tensor]:
        """`read` of each run of rows; the factor that all of them share is read once."""
        delta = tensor.delta
        if delta is None:
            yield from (self._stored(tensor, rows) for rows in runs)
            return
        wide = torch.float64 if "F64" in (tensor.dtype, delta.a.dtype, delta.b.dtype) else torch.float32
        shared = (self._stored(delta.b, None).T if delta.transposed else self._stored(delta.a, None)).to(wide)
        for rows in runs:
            own = self._columns(delta.a, rows).T if delta.transposed else self._stored(delta.b, rows)
            yield self._stored(tensor, rows).to(wide).addmm_(own.to(wide), shared, alpha=delta.scaling)

    def _columns(self, matrix: TensorInfo, columns: slice) -> Tensor:
        """Some of a matrix's columns, of which nothing else is held."""
        rows, width = matrix.shape
        count = columns.stop - columns.start
        return torch.stack([self._values(matrix, (count,), row * width + columns.start) for row in range(rows)])

    def _stored(self, tensor: TensorInfo, rows: slice | None) -> Tensor:
        if rows is None:
            return self._values(tensor, tensor.shape, 0)
        inner = tensor.shape[1:]
        return self._values(tensor, (rows.stop - rows.start, *inner), rows.start * math.prod(inner))

    def _values(self, tensor: TensorInfo, shape: tuple[int, ...], start: int) -> Tensor:
        """Consecutive values of the file, from the tensor's value number `start` on."""
        found = torch.empty(shape, dtype=TORCH_DTYPES[tensor.dtype])
        left = as_bytes(found)
        position = tensor.offset + start * found.element_size()
        try:
            descriptor = self._open(tensor.path)
            while left:
                count = os.preadv(descriptor, [left], position)
                if count == 0:
                    raise InvalidCheckpoint(tensor.source, f"{tensor.file} became shorter while the job ran")
                left, position = left[count:], position + count
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:  # nothing is wrong with the file
                raise
            raise InvalidCheckpoint(tensor.source, f"{tensor.file} cannot be read: {error.strerror}") from error
        return found

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # of one element, a contiguous tensor may have any stride
    return flat.view(torch.uint8).numpy().data


class Digests:
    """sha256 of files, hex. Each is computed once while size and times of the file stay what they are."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}

    def of_checkpoint(self, info: CheckpointInfo) -> str:
        """`sha256:` over the names and digests of config and weight files; of an adapter, with its base's digest."""
        [digest] = self.of_checkpoints([info], threads=1)
        return digest

    def of_checkpoints(self, infos: Sequence[CheckpointInfo], threads: int) -> list[str]:
        """As `of_checkpoint`, a file in each thread."""
        bases = [info.base for info in infos if info.base is not None]
        files = {info.path / name for info in (*infos, *bases) for name in _files(info)}
        of_files: dict[Path, str] = {}

        def digest(path: Path) -> None:
            of_files[path] = self._of_file(path)

        in_threads(digest, sorted(files), threads, lambda: None)

        def of(info: CheckpointInfo) -> str:
            digests = {name: of_files[info.path / name] for name in _files(info)}
            if info.base is not None:
                digests["base"] = of(info.base)
            return f"sha256:{_joined(digests)}"

        return [of(info) for info in infos]

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        key = file_identity(stat)
        if key in self._known:
            return self._known[key]
        digest = digest_file(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > CLOCK_TICK_NS:
            self._known[key] = digest
        return digest


def file_identity(stat: os.stat_result) -> tuple[int, ...]:
    """A value that stays equal while a file is the same and is not written to, by whatever path it is opened."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def digest_file(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tokenizer(info: CheckpointInfo) -> str:
    """sha256, hex, over the names and digests of the tokenizer's files."""
    names = [name for name in TOKENIZER_FILES if (info.tokenizer_path / name).exists()]
    return _joined({name: digest_file(info.tokenizer_path / name) for name in names})


def _files(info: CheckpointInfo) -> Sequence[str]:
    if info.base is None:
        return ["config.json", *info.weight_files]
    labels = ["config.json"] if (info.path / "config.json").exists() else []
    return [ADAPTER_CONFIG, *labels, *info.weight_files]


def _joined(digests: dict[str, str]) -> str:
    lines = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
