"""The interface between the executor and a method: a tensor's versions go in, merged blocks of rows come out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from worker.engine.catalog.families import ScoreName, Slot
from worker.engine.catalog.planning.memory import BLOCK_ELEMENTS
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace, takes_part
from worker.engine.checkpoints.row_blocks import row_blocks

CHUNK_ELEMENTS = 1 << 16  # elements of one version that several steps handle together: they stay in a core's cache
SAMPLED_RUNS = 16  # runs of rows in a sample: enough that no part of a tensor stands for all of it


@dataclass(frozen=True)
class Block:
    """Some rows of every version of a tensor, (rows, *rest of the tensor's shape), float32, or float64 where one is.

    A tensor without axes is one block of no axes. Nobody else reads these tensors, but a method may be given the same
    block twice, so it leaves them as they are.
    """

    rows: slice
    versions: Sequence[Tensor]
    base: Tensor | None

    @classmethod
    def of(cls, rows: slice, versions: Sequence[Tensor], base: Tensor | None) -> "Block":
        """Make a block of tensors as they are stored, in whichever formats."""
        wide = any(values.dtype == torch.float64 for values in (*versions, *([] if base is None else [base])))
        dtype = torch.float64 if wide else torch.float32
        return cls(rows, [version.to(dtype) for version in versions], None if base is None else base.to(dtype))

    @property
    def deltas(self) -> list[Tensor]:
        """Return the task vectors, each version less the base. They are computed anew, so that they may be changed."""
        base = required_base(self.base)
        return [version - base for version in self.versions]


class Versions:
    """The versions of one tensor, one per model that takes part, read when they are asked for.

    Going through the blocks reads the files again, unless the tensor is a single block, which is held.

    Args:
        shape: shape of the tensor; its rows run along the first axis.
        read: reads the block of some rows.
        block_elements: number of elements of one version in a block.
    """

    def __init__(
        self,
        slot: Slot,
        place: TensorPlace,
        shape: Sequence[int],
        read: Callable[[slice], Block],
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        self.slot = slot
        self.place = place
        self.shape = tuple(shape)
        self.block_elements = block_elements
        self._read = read
        self._runs = row_blocks(self.shape, block_elements)
        self._held: Block | None = None

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self._runs)

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks in order. They are always the same, so that sums over them are the same sums."""
        if len(self._runs) == 1:
            yield self.whole()
            return
        for rows in self._runs:
            yield self._read(rows)

    def some(self, rows: slice) -> Block:
        """Read the block of these rows."""
        return self._read(rows)

    def sample(self, elements: int) -> Iterator[Block]:
        """Yield runs of rows from all over the tensor.

        They have about `elements` elements, or are a few rows that have more. A tensor of a single block gives that.
        """
        if len(self._runs) == 1:
            yield self.whole()
            return
        rows = self.shape[0]
        length = min(self._runs[0].stop, max(1, elements // (SAMPLED_RUNS * max(1, math.prod(self.shape[1:])))))
        for start in range(0, rows, max(length, rows // SAMPLED_RUNS)):
            yield self._read(slice(start, min(start + length, rows)))

    def whole(self) -> Block:
        """Read all rows at once, for methods that cannot do with less."""
        if self._held is None:
            self._held = self._read(slice(0, self.shape[0] if self.shape else 1))
        return self._held


BlockMerge = Callable[[Block], Tensor]
"""Returns the merged rows of a block, in its dtype and shape."""
Merger = Callable[[Versions], BlockMerge]
"""A method over its models. It computes here all that it needs of a whole tensor, such as norms or thresholds.

It is called from several threads, for different tensors, in which PyTorch computes on one thread alone.
"""


class TensorRows(Protocol):
    """A tensor, or an object that gives its rows when they are asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class MeasuredModel:
    """A model as a method sees it: its weight lambda, its own parameters, and its statistics.

    `grams` and `fisher` may be on disk and read when they are asked for.
    """

    weight: PerTensor[float]
    """The model's lambda, see `model_weights`."""
    scores: Mapping[ScoreName, Tensor] = field(default_factory=dict)
    """Scores of mask nodes, (nodes,), float64, by score name."""
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean of `x x^T` over non-padding tokens, (inputs, inputs), float32, by `Slot.input`."""
    fisher: Mapping[str, TensorRows] = field(default_factory=dict)
    """Fisher information of every parameter, float32, in the shape of its tensor, by `Slot.name`."""
    parameters: Mapping[str, PerTensor[float]] = field(default_factory=dict)
    """The model's own values of the method's parameters, see `MethodParameters.of_model`."""
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """All statistics of the method as they are kept, by name; `scores`, `grams` and `fisher` are read from these."""

    @property
    def takes_part(self) -> bool:
        """Whether its weight is not 0 for at least one tensor."""
        return takes_part(self.weight)


def required_base(base: Tensor | None) -> Tensor:
    if base is None:
        raise RuntimeError("the method needs a base; planning should have refused this")
    return base
