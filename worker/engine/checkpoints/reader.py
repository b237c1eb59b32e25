"""Reads tensors of checkpoints where they lie, a run of rows at a time."""

import hashlib
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.companions import companions
from worker.engine.catalog.checkpoints.files import ADAPTER_CONFIG, PROCESSORS, TOKENIZER_FILES
from worker.engine.catalog.checkpoints.info import CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.inspection import TOO_MANY_OPEN
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

    Files are read, not mapped, so that values count as memory of the process only while they are held.
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

    def open(self, paths: Iterable[Path]) -> None:
        """Open files now, so that what is read later is what they are now. Raises OSError."""
        for path in paths:
            self._open(path)

    def read(self, tensor: TensorInfo, rows: slice | None = None) -> Tensor:
        """Read a tensor, or some of its rows: (rows, *tensor.shape[1:]).

        The result has the stored dtype. If an adapter adds to the tensor, it has float32, or float64 if either of them
        has that.

        Args:
            rows: start and stop along the first axis, for a tensor that has one.

        Raises:
            InvalidCheckpoint: the file no longer agrees with its header.
            OSError: this process may open no more files.
        """
        if tensor.delta is None:
            return self._stored(tensor, rows)
        [found] = self.read_runs(tensor, [rows or slice(0, tensor.shape[0])])
        return found

    def read_runs(self, tensor: TensorInfo, runs: Iterable[slice]) -> Iterator[Tensor]:
        """Yield `read` of each run of rows; the factor that all of them share is read once."""
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
        """Read some of a matrix's columns, and hold nothing else of it."""
        rows, width = matrix.shape
        count = columns.stop - columns.start
        return torch.stack([self._values(matrix, (count,), row * width + columns.start) for row in range(rows)])

    def _stored(self, tensor: TensorInfo, rows: slice | None) -> Tensor:
        if rows is None:
            return self._values(tensor, tensor.shape, 0)
        inner = tensor.shape[1:]
        return self._values(tensor, (rows.stop - rows.start, *inner), rows.start * math.prod(inner))

    def _values(self, tensor: TensorInfo, shape: tuple[int, ...], start: int) -> Tensor:
        """Read consecutive values of a tensor from the file, from its value number `start` on."""
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
    """Return the memory of a contiguous tensor on the CPU."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a contiguous tensor of one element may have any stride
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class ExpectedFile:
    """A file of an earlier job's model, with the sha256, in hexadecimal, that it was written with."""

    source: str
    name: str
    sha256: str


class Digests:
    """Computes the sha256 of files, in hexadecimal, once for each file until its size or times change."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}

    def of_checkpoint(self, info: CheckpointInfo) -> str:
        """Return `sha256:` over names and digests of config and weight files, and over an adapter's base's digest."""
        [digest] = self.of_checkpoints([info], threads=1)
        return digest

    def of_checkpoints(self, infos: Sequence[CheckpointInfo], threads: int) -> list[str]:
        """Return `of_checkpoint` for each checkpoint; each thread reads one file at a time."""
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

    def check_expected(self, files: Mapping[Path, ExpectedFile], threads: int) -> None:
        """Check that files are what an earlier job wrote. Raises InvalidCheckpoint, which names the file."""

        def check(path: Path) -> None:
            file = files[path]
            if self._of_file(path) != file.sha256:
                raise InvalidCheckpoint(
                    file.source,
                    f"{file.name} is damaged: its bytes are not those that the job wrote; run that job again, or "
                    "restore its artifact from a backup",
                )

        in_threads(check, sorted(files), threads, lambda: None)

    def of_files(self, paths: Collection[Path], threads: int) -> str:
        """Return `sha256:` of a file; of several files, over their names and digests."""
        of_files: dict[str, str] = {}

        def digest(path: Path) -> None:
            of_files[path.name] = self._of_file(path)

        in_threads(digest, sorted(paths), threads, lambda: None)
        [single, *others] = of_files.values()
        return f"sha256:{_joined({name: of_files[name] for name in sorted(of_files)}) if others else single}"

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
    """Return a value that stays equal while a file is the same and is not written to, whichever path opens it."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def digest_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tokenizer(info: CheckpointInfo) -> str:
    """Return the sha256, in hexadecimal, over the names and digests of the tokenizer's files."""
    names = [name for name in TOKENIZER_FILES if (info.tokenizer_path / name).exists()]
    return _joined({name: digest_file(info.tokenizer_path / name) for name in names})


def digest_processor(info: CheckpointInfo) -> str:
    """Return the sha256, in hexadecimal, over the names and digests of the files that say how inputs are made."""
    found = companions(info)
    return _joined({name: digest_file(found[name]) for name in PROCESSORS if name in found})


def _files(info: CheckpointInfo) -> Sequence[str]:
    if info.base is None:
        return ["config.json", *info.weight_files]
    labels = ["config.json"] if (info.path / "config.json").exists() else []
    return [ADAPTER_CONFIG, *labels, *info.weight_files]


def _joined(digests: dict[str, str]) -> str:
    lines = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()
