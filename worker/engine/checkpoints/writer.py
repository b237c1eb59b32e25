"""Writing checkpoints: each tensor once, at its place, in one pass over the inputs.

The layout is known from the plan, so a shard's header is written first and its tensors follow as they are computed;
nothing is held longer than one tensor.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from worker.engine.catalog.errors import NumericalError
from worker.engine.catalog.headers import DTYPE_BYTES, INDEX, TOKENIZER_FILES, CheckpointInfo
from worker.engine.catalog.planning import MergePlan, PlannedTensor
from worker.engine.checkpoints.reader import TensorReader

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class ShardWriter:
    """One safetensors file, written from its first byte to its last; closing it early leaves no file behind."""

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]) -> None:
        self._path = path
        # Wider dtypes first keeps every tensor aligned, as the format's own library does.
        self.tensors = sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])
        self._written = 0
        self._digest = hashlib.sha256()
        self._stream = path.open("xb")
        self._put(self._header())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        complete = self._written == len(self.tensors)
        if kind is None and complete:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        if kind is not None or not complete:
            self._path.unlink()
        if kind is None and not complete:
            raise RuntimeError(f"{self._path.name}: {self._written} of {len(self.tensors)} tensors were written")

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, tensor: Tensor) -> None:
        """The next of `tensors`, cast to its planned dtype."""
        planned = self.tensors[self._written]
        if tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{planned.slot.name} has shape {tuple(tensor.shape)}, planned was {planned.shape}")
        stored = tensor.to(TORCH_DTYPES[planned.dtype]).contiguous()
        if not bool(torch.isfinite(stored).all()):
            problem = f"has values beyond {CONFIG_DTYPES[planned.dtype]}; choose a wider output.dtype"
            raise NumericalError(f"tensor {planned.slot.name} {problem}", tensor=planned.slot.name)
        flat = stored.as_strided((stored.numel(),), (1,))  # of one element, a contiguous tensor may have any stride
        self._put(flat.view(torch.uint8).numpy().data)
        self._written += 1

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._stream.write(data)

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self.tensors:
            end = position + tensor.nbytes
            header[tensor.slot.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw


def write_models(
    plan: MergePlan,
    folders: Mapping[str, Path],
    merged: Callable[[PlannedTensor], Tensor],
    max_shard_bytes: int,
    on_tensor: Callable[[], None],
) -> dict[Path, str]:
    """Write every model's folder: the shared backbone once, hard-linked, and each model's own head.

    Args:
        folders: existing, by model, in the plan's order.
        merged: computes a backbone tensor.
        on_tensor: called after each tensor; may raise to stop.

    Returns:
        The sha256 of every shard, taken while it was written; of a shared one under its first name.
    """
    digests: dict[Path, str] = {}
    shards = cut_into_shards(plan.backbone, max_shard_bytes)
    count = len(shards) + 1  # each model's head is one more
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    first, *others = folders.values()
    for name, shard in zip(names, shards, strict=False):
        with ShardWriter(first / name, shard) as writer:
            for tensor in writer.tensors:
                writer.write(merged(tensor))
                on_tensor()
        digests[first / name] = writer.sha256
        for folder in others:
            os.link(first / name, folder / name)
    for folder, info, head in zip(folders.values(), plan.checkpoints, plan.heads, strict=True):
        digests[folder / names[-1]] = _write_head(folder / names[-1], info, head, {}, on_tensor)
        weight_map = {t.slot.name: name for name, shard in zip(names, [*shards, head], strict=True) for t in shard}
        size = sum(t.nbytes for t in (*plan.backbone, *head))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
        _write_config(info, plan.backbone[0].dtype, folder)
        _copy_tokenizer(info, folder)
    return digests


def rewrite_head(
    folder: Path, info: CheckpointInfo, head: Sequence[PlannedTensor], replaced: Mapping[str, Tensor]
) -> tuple[Path, str]:
    """Write a model's own shard anew, with other tensors for some names; the file and its sha256."""
    path = max(folder.glob("model-*.safetensors"))  # the last shard, see `write_models`
    path.unlink()
    return path, _write_head(path, info, head, replaced, lambda: None)


def _write_head(
    path: Path,
    info: CheckpointInfo,
    head: Sequence[PlannedTensor],
    replaced: Mapping[str, Tensor],
    on_tensor: Callable[[], None],
) -> str:
    with TensorReader(info) as reader, ShardWriter(path, head) as writer:
        for tensor in writer.tensors:
            name = tensor.slot.name
            writer.write(replaced[name] if name in replaced else reader.read(tensor.sources[0]))
            on_tensor()
    return writer.sha256


def cut_into_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Consecutive runs of at most `max_bytes`; a larger tensor is a shard of its own."""
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
    """A safetensors file that others may read. Raises OSError where the library has an exception of its own."""
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


def _write_config(info: CheckpointInfo, dtype: str, folder: Path) -> None:
    # Where the input lay is nobody's business, and `dtype` replaces the older key.
    config = {key: value for key, value in info.config.items() if key not in ("_name_or_path", "torch_dtype")}
    write_json(folder / "config.json", {**config, "dtype": CONFIG_DTYPES[dtype]})


def _copy_tokenizer(info: CheckpointInfo, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (info.path / name).is_file():
            shutil.copyfile(info.path / name, folder / name)
