"""Tensors of a checkpoint, read one at a time."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.engine.catalog.errors import InvalidCheckpoint
from worker.engine.catalog.headers import TOKENIZER_FILES, CheckpointInfo, TensorInfo

CHUNK_BYTES = 4 << 20


class TensorReader:
    """Opens each weight file once, memory-mapped, while in context."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, tensor: TensorInfo) -> Tensor:
        """The tensor in its own dtype.

        Raises:
            InvalidCheckpoint: the file is no longer what its header said.
        """
        try:
            if tensor.file not in self._files:
                path = self._info.path / tensor.file
                self._files[tensor.file] = self._stack.enter_context(safe_open(path, framework="pt"))
            found: Tensor = self._files[tensor.file].get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(self._info.source, f"{tensor.file} cannot be read: {error}") from error
        if tuple(found.shape) != tensor.shape:
            raise InvalidCheckpoint(self._info.source, f"tensor {tensor.name} changed while the job ran")
        return found


def digest_file(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_checkpoint(info: CheckpointInfo) -> str:
    """`sha256:` over the names and digests of config and weight files."""
    return f"sha256:{_digest_files(info, ['config.json', *info.weight_files])}"


def digest_tokenizer(info: CheckpointInfo) -> str:
    """sha256, hex, over the names and digests of the tokenizer's files."""
    return _digest_files(info, [name for name in TOKENIZER_FILES if (info.path / name).exists()])


def _digest_files(info: CheckpointInfo, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{digest_file(info.path / name)}\n".encode())
    return digest.hexdigest()
