"""Writes checkpoints: each tensor once, at its place, in one pass over the inputs.

The layout is known from the plan, so a shard has its header and its size before any tensor is computed, and tensors may
come in any order. Nothing is held longer than a run of rows.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from worker.engine.catalog.checkpoints.files import ENCODER_CONFIGS, INDEX, MODULES, WEIGHTS
from worker.engine.catalog.checkpoints.info import DTYPE_BYTES, CheckpointInfo
from worker.engine.catalog.checkpoints.library import encoded
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.catalog.primitives.errors import NumericalError
from worker.engine.checkpoints.reader import TORCH_DTYPES, TensorReader, as_bytes
from worker.engine.checkpoints.row_blocks import is_finite
from worker.engine.checkpoints.tokenizer import write_chat_template, write_tokenizer
from worker.engine.checkpoints.written import WrittenFile, WrittenTensor
from worker.engine.runtime.threads import in_threads

CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MODULE_KEYS = ("idx", "name", "path", "type", "kwargs")
LARGE = 16  # a tensor is large that has more elements than a thread's part of all elements, divided by this
DIGEST_BYTES = 1 << 18  # each part is read into the same memory, which stays in a cache

RowRuns = Iterable[tuple[slice, Tensor]]
"""Runs of rows along a tensor's first axis, each with its values."""


class ShardWriter:
    """Writes one safetensors file, whose tensors may come in any order and from several threads.

    The file exists with its whole size from the first tensor on, and is closed after the last. Leaving the context
    earlier leaves no file behind. The file is not flushed to the disk.
    """

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        self.path = path
        # With wider dtypes first every tensor is aligned, as in the format's own library.
        self.tensors = sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])
        self._header = _header(self.tensors)
        ends = [*accumulate((t.nbytes for t in self.tensors), initial=len(self._header))]
        self._places = {t.slot.name: place for t, place in zip(self.tensors, pairwise(ends), strict=True)}
        self._size = ends[-1]
        self._checksums: dict[str, int] = {}  # of complete tensors
        self._digest = hashlib.sha256()
        self._digested = self._following = 0
        self._descriptor: int | None = None
        self._opening, self._digesting = Lock(), Lock()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        complete = self._is_complete()
        if self._descriptor is not None and not complete:
            os.close(self._descriptor)
        if self._descriptor is not None and (kind or not complete):
            self.path.unlink()
        if kind is None and not complete:
            raise RuntimeError(f"{self.path.name}: {len(self._checksums)} of {len(self.tensors)} tensors were written")

    @property
    def written(self) -> WrittenFile:
        """What the file holds, once it is complete."""
        tensors = [
            WrittenTensor(t.slot.stored, *self._places[t.slot.name], self._checksums[t.slot.name]) for t in self.tensors
        ]
        return WrittenFile(self.path, self._digest.hexdigest(), self._header, tensors)

    def write(self, planned: PlannedTensor, rows: RowRuns) -> None:
        """Write one of `tensors` as a whole, cast to its planned dtype.

        Raises:
            NumericalError: a value is NaN or beyond the dtype.
        """
        descriptor = self._open()
        position, end = self._places[planned.slot.name]
        checksum = 0
        for _, values in rows:
            if tuple(values.shape[1:]) != planned.shape[1:] or values.dim() != len(planned.shape):
                raise ValueError(f"{planned.slot.name} has rows of {tuple(values.shape)}, planned was {planned.shape}")
            stored = values.to(TORCH_DTYPES[planned.dtype]).contiguous()
            if not is_finite(stored):
                problem = f"has values beyond {CONFIG_DTYPES[planned.dtype]}; choose a wider output.dtype"
                raise NumericalError(f"tensor {planned.slot.stored} {problem}", tensor=planned.slot.stored)
            merged = as_bytes(stored)
            checksum = zlib.crc32(merged, checksum)
            position = _write_at(descriptor, merged, position)
        if position != end:
            missing = end - position
            raise ValueError(f"{planned.slot.name}, planned as {planned.shape}, lacks {missing} bytes")
        self._checksums[planned.slot.name] = checksum
        self._follow(descriptor)

    def _is_complete(self) -> bool:
        return self._following == len(self.tensors)

    def _open(self) -> int:
        with self._opening:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                os.truncate(self._descriptor, self._size)
                _write_at(self._descriptor, memoryview(self._header), 0)
            return self._descriptor

    def _follow(self, descriptor: int) -> None:
        """Digest the complete part of the file from its start on, and close the file at its end.

        One thread does so at a time. Another thread that completes a tensor meanwhile leaves it to this one, which
        looks again after it has released the lock.
        """
        while self._next_is_complete() and self._digesting.acquire(blocking=False):
            try:
                while self._next_is_complete():
                    self._digest_to(descriptor, self._places[self.tensors[self._following].slot.name][1])
                    self._following += 1
                    if self._is_complete():
                        os.close(descriptor)
            finally:
                self._digesting.release()

    def _next_is_complete(self) -> bool:
        at = self._following  # another thread may be moving it on
        return at < len(self.tensors) and self.tensors[at].slot.name in self._checksums

    def _digest_to(self, descriptor: int, end: int) -> None:
        buffer = memoryview(bytearray(min(DIGEST_BYTES, end - self._digested)))
        while self._digested < end:
            count = os.preadv(descriptor, [buffer[: end - self._digested]], self._digested)
            if count == 0:
                raise OSError(errno.EIO, "it became shorter while it was written", str(self.path))
            self._digest.update(buffer[:count])
            self._digested += count


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.slot.stored] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write data at a position, and return the position after it."""
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
    return position


def write_models(
    plan: MergePlan,
    folders: Sequence[Path],
    rows_of: Callable[[PlannedTensor], RowRuns],
    max_shard_bytes: int,
    threads: int | None,
    on_tensor: Callable[[], None],
) -> list[WrittenFile]:
    """Write every published model's folder: the shared backbone once, hard-linked, and each model's own head.

    A model that fits into one file is `model.safetensors`, as transformers and its users expect.

    Args:
        folders: existing folders, one for each of `plan.published`.
        rows_of: computes a tensor, or reads it if it is copied.
        threads: number of threads, each of which computes one tensor at a time; None: this thread computes one after
            the other, with all cores.
        on_tensor: called after each tensor; may raise to stop.

    Returns:
        Every shard; a shared one has its first name.
    """
    shards = cut_into_shards(plan.backbone, max_shard_bytes)
    count = len(shards) + (not plan.merges_heads)  # each model's head is one more
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    first, *others = folders
    with ExitStack() as stack:

        def writer(path: Path, tensors: Sequence[PlannedTensor]) -> ShardWriter:
            return stack.enter_context(ShardWriter(path, tensors))

        backbone = [writer(first / name, shard) for name, shard in zip(names, shards, strict=False)]
        heads = [writer(folder / names[-1], head) for folder, head in zip(folders, plan.heads, strict=True) if head]
        work = [(shard, tensor) for shard in (*backbone, *heads) for tensor in shard.tensors]
        work = largest_first(work, threads or 1)
        in_threads(lambda item: item[0].write(item[1], rows_of(item[1])), work, threads, on_tensor)
    for folder in others:
        for name in names[:-1]:
            os.link(first / name, folder / name)
    for folder, info, head in zip(folders, plan.published, plan.heads, strict=True):
        parts = [*shards, head] if head else shards
        weight_map = {t.slot.stored: name for name, shard in zip(names, parts, strict=True) for t in shard}
        size = sum(t.nbytes for t in (*plan.backbone, *head))
        if count > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / INDEX, index)
        write_config(info, plan, folder)
        write_tokenizer(plan.tokens_of(info), plan.vocabulary, folder)
        if plan.chat_template is not None:
            write_chat_template(plan.chat_template, folder)
    return [writer.written for writer in (*backbone, *heads)]


def write_modules(
    plan: MergePlan, folders: Sequence[Path], rows_of: Callable[[PlannedTensor], RowRuns]
) -> list[WrittenFile]:
    """Write the modules of sentence-transformers of every published model, and return their weight files.

    Args:
        folders: existing folders, one for each of `plan.published`.
        rows_of: computes a tensor of a module, or reads it if it is copied.
    """
    files = []
    for folder, planned in zip(folders, plan.modules, strict=bool(plan.modules)):
        if planned is None:
            continue
        modules = planned.modules
        write_json(
            folder / MODULES, [{key: entry[key] for key in MODULE_KEYS if key in entry} for entry in modules.entries]
        )
        if modules.encoder:
            write_json(folder / ENCODER_CONFIGS[0], modules.encoder)
        for name, file in modules.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        for name, tensors in planned.tensors.items():
            with ShardWriter(folder / name / WEIGHTS, tensors) as writer:
                for tensor in writer.tensors:
                    writer.write(tensor, rows_of(tensor))
            files.append(writer.written)
    return files


def largest_first(
    work: Sequence[tuple[ShardWriter, PlannedTensor]], threads: int
) -> list[tuple[ShardWriter, PlannedTensor]]:
    """Put large tensors first, because other threads would wait for one that comes last. The rest keep their order."""
    much = sum(math.prod(tensor.shape) for _, tensor in work) / (LARGE * threads)
    return sorted(work, key=lambda item: math.prod(item[1].shape) < much)


def rewrite_head(folder: Path, head: Sequence[PlannedTensor], replaced: Mapping[str, Tensor]) -> WrittenFile:
    """Write a model's own shard anew, with other tensors for some names."""
    path = max(folder.glob("model-*.safetensors"))  # the last shard, see `write_models`
    path.unlink()
    with TensorReader() as reader, ShardWriter(path, head) as writer:
        for tensor in writer.tensors:
            new = replaced.get(tensor.slot.name)
            values = reader.read(tensor.sources[0]) if new is None else new
            writer.write(tensor, [(slice(0, len(values)), values)])
    return writer.written


def cut_into_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Cut tensors into consecutive runs of at most `max_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save a safetensors file that others may read. Raises OSError where the library has an exception of its own."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(0o644)  # the library makes files that only their owner reads


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(info: CheckpointInfo, plan: MergePlan, folder: Path) -> None:
    # The place of the input is nobody's business, and `dtype` replaces the older key.
    config = {key: value for key, value in info.config.items() if key not in ("_name_or_path", "torch_dtype")}
    if plan.vocabulary is not None:
        config = plan.vocabulary.config(config)
    write_json(folder / "config.json", encoded({**config, "dtype": CONFIG_DTYPES[plan.dtype]}))
