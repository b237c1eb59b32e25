"""Measures how far task vectors of different models contradict each other, by layer: cosines and sign conflicts.

With `t_i = theta_i - theta_0` over all merged values of a layer, `cosine = <t_i, t_j> / (|t_i| |t_j|)`; a value is in
conflict where `t_i` and `t_j` have opposite signs (Yadav et al. 2023, arXiv 2306.01708, section 3), out of those where
neither is 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.catalog.checkpoints.info import FLOATS
from worker.engine.catalog.planning.memory import BLOCK_ELEMENTS
from worker.engine.catalog.planning.plan import MergePlan, PlannedTensor
from worker.engine.checkpoints.reader import TensorReader
from worker.engine.merging.methods.blocks import CHUNK_ELEMENTS, Block
from worker.engine.merging.token_rows import read_by_token

RUNS = 32  # runs of rows, evenly spread over a tensor that is not read whole: each is a read of its own


@dataclass
class TaskVectors:
    """Sums over the values of one layer; matrices are (models, models), float64."""

    products: Tensor
    """Inner products `<t_i, t_j>`."""
    agreeing: Tensor
    """Numbers of values with the same sign, without zeros."""
    opposed: Tensor
    """Numbers of values with opposite signs."""

    @classmethod
    def of_none(cls, models: int) -> "TaskVectors":
        return cls(*torch.zeros(3, models, models, dtype=torch.float64))

    def add(self, deltas: Tensor) -> None:
        """Add values of the task vectors, (models, values), float64."""
        self.products += deltas @ deltas.T
        signs = deltas.sign()
        present = signs.abs()
        same, both = signs @ signs.T, present @ present.T  # whole numbers, exact in float64
        self.agreeing += (both + same) / 2
        self.opposed += (both - same) / 2

    def __iadd__(self, other: "TaskVectors") -> "TaskVectors":
        self.products += other.products
        self.agreeing += other.agreeing
        self.opposed += other.opposed
        return self

    @property
    def cosines(self) -> Tensor:
        """Cosines of the task vectors, (models, models); NaN where a task vector is 0."""
        lengths = self.products.diagonal().sqrt()
        return self.products / (lengths[:, None] * lengths)

    @property
    def conflicts(self) -> Tensor:
        """Shares of values with opposite signs, (models, models); NaN where no value changed in both."""
        return self.opposed / (self.opposed + self.agreeing)


@dataclass(frozen=True)
class Interference:
    """The interference of `models` task vectors."""

    models: int
    layers: Mapping[tuple[str, int | None], TaskVectors]
    """Sums by stack and layer, see `Slot.stack`; None: everything outside the layers."""
    values: int
    """Number of values of each model that were read."""
    of: int
    """Number of values of each model in all."""

    @property
    def whole(self) -> TaskVectors:
        """Sums over all layers."""
        total = TaskVectors.of_none(self.models)
        for layer in self.layers.values():
            total += layer
        return total

    def of_pairs(self, matrix: Tensor) -> list[float]:
        """Return the entries of a (models, models) matrix above the diagonal: (0, 1), (0, 2) and so on."""
        rows, columns = torch.triu_indices(self.models, self.models, 1)
        return matrix[rows, columns].tolist()


def compared_tensors(plan: MergePlan, taking_part: Sequence[int]) -> list[PlannedTensor]:
    """Return the tensors in which these models have task vectors; none without a base or with fewer than two models."""
    if plan.base is None or len(taking_part) < 2:
        return []
    return [
        planned
        for planned in plan.backbone
        if not planned.is_copied
        and planned.base is not None
        and planned.base.dtype in FLOATS
        # All of the models take part in the tensor's slice.
        and (planned.members is None or {*taking_part} <= {*planned.members})
    ]


def interference(
    tensors: Sequence[PlannedTensor],
    taking_part: Sequence[int],
    most: int = BLOCK_ELEMENTS,
    on_tensor: Callable[[], None] = lambda: None,
) -> Interference | None:
    """Compare the task vectors of these models of the plan in `compared_tensors`; None where there are none.

    At most `most` values of each model are read from a tensor (or one row, if that is longer). Larger tensors are read
    in runs of rows that are evenly spread.
    """
    layers: dict[tuple[str, int | None], TaskVectors] = {}
    values, of = 0, 0
    with TensorReader() as reader:
        for planned in tensors:
            slot = planned.slot
            layer = layers.setdefault((slot.stack, slot.layer), TaskVectors.of_none(len(taking_part)))
            of += math.prod(planned.shape)
            for block in _blocks(reader, planned, taking_part, most):
                values += block.versions[0].numel()
                _add(layer, block)
            on_tensor()
    return Interference(len(taking_part), layers, values, of) if values else None


def spread_runs(shape: Sequence[int], most: int) -> list[slice]:
    """Return evenly spread runs of rows with at most `most` values together; all rows where they have no more."""
    rows = shape[0] if shape else 1
    wanted = max(1, most // max(1, math.prod(shape[1:])))
    if wanted >= rows:
        return [slice(0, rows)]
    count = min(RUNS, wanted)
    length = wanted // count
    starts = [index * (rows - length) // max(1, count - 1) for index in range(count)]
    return [slice(start, start + length) for start in starts]


def _blocks(reader: TensorReader, planned: PlannedTensor, taking_part: Sequence[int], most: int) -> list[Block]:
    runs = spread_runs(planned.shape, most)
    if planned.members is not None:
        taking_part = [planned.members.index(model) for model in taking_part]
    if planned.token_rows is not None:
        return [read_by_token(reader, planned, taking_part, rows) for rows in runs]
    sources = [planned.sources[index] for index in taking_part]
    tensors = [*sources, *([planned.base] if planned.base else [])]
    if not planned.shape:
        *versions, base = [reader.read(tensor) for tensor in tensors]
        return [Block.of(runs[0], versions, base)]
    read = [list(reader.read_runs(tensor, runs)) for tensor in tensors]
    return [Block.of(rows, versions, base) for rows, *versions, base in zip(runs, *read, strict=True)]


def _add(layer: TaskVectors, block: Block) -> None:
    """Add a block chunk by chunk, so that values in float64 stay few."""
    deltas = [delta.reshape(-1) for delta in block.deltas]
    for start in range(0, len(deltas[0]), CHUNK_ELEMENTS):
        layer.add(torch.stack([delta[start : start + CHUNK_ELEMENTS] for delta in deltas]).double())
