"""What is known of a checkpoint and its tensors without reading a weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.architectures import architecture_of
from worker.engine.catalog.checkpoints.files import ADAPTER_WEIGHTS

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class LowRank:
    """The update that an adapter adds to a matrix: `scaling * B A`, (outputs, inputs), or its transpose.

    The transpose is added where the matrix is stored as (inputs, outputs).
    """

    a: "TensorInfo"
    """The matrix A, (rank, inputs)."""
    b: "TensorInfo"
    """The matrix B, (outputs, rank)."""
    scaling: float
    transposed: bool
    """Whether the matrix is stored as (inputs, outputs), as embeddings and the layers of GPT-2 are."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: its place, data type and shape. `source` is its checkpoint's, for messages."""

    source: str
    name: str
    path: Path
    offset: int
    """Position of its first byte in the file."""
    dtype: str
    shape: tuple[int, ...]
    delta: LowRank | None = None
    """An adapter's update, which is added when the tensor is read."""

    @property
    def file(self) -> str:
        return self.path.name

    @property
    def nbytes(self) -> int:
        """Number of bytes that are read for the tensor."""
        own = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        return own if self.delta is None else own + self.delta.a.nbytes + self.delta.b.nbytes


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its headers describe it. `source` is the name the user gave it, used in every message."""

    source: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    vocabulary: Mapping[str, str]
    """Digests of the rules that cut text into token ids, by the form they are stored in; empty without a tokenizer."""
    tokenizer_path: Path
    """Folder of the tokenizer's files."""
    base: "CheckpointInfo | None" = None
    """The model that an adapter adapts. Its tensors are among this checkpoint's, its files are not."""
    last_token: int | None = None
    """Highest id that the tokenizer gives; None where its files do not tell."""
    notes: tuple[str, ...] = ()
    """Notes for the result of a job that reads the checkpoint."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)

    @property
    def weight_files(self) -> list[str]:
        """Names of the checkpoint's own weight files."""
        if self.base is not None:
            return [ADAPTER_WEIGHTS]
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
