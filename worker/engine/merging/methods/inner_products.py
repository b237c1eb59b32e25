"""Inner products of versions, or of their task vectors, from which angles and norms follow."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from worker.engine.merging.methods.blocks import CHUNK_ELEMENTS, Block, Versions


def inner_products(versions: Versions, vectors: Callable[[Block], Sequence[Tensor]]) -> Tensor:
    """Compute inner products of whole tensors as vectors: (vectors, vectors), float64, summed in the blocks' order."""
    of_blocks = (_products([v.flatten() for v in vectors(block)]) for block in versions.blocks())
    return summed(of_blocks)


def summed(of_blocks: Iterable[Tensor]) -> Tensor:
    """Sum tensors one after the other: if all were kept, they would take up room that the next blocks need."""
    return sum(of_blocks, start=torch.zeros((), dtype=torch.float64))


def _products(vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    chunk = torch.empty(len(vectors), min(CHUNK_ELEMENTS, vectors[0].numel()), dtype=torch.float64)
    for parts in zip(*(torch.split(vector, CHUNK_ELEMENTS) for vector in vectors), strict=True):
        some = chunk[:, : parts[0].numel()]
        for row, part in zip(some, parts, strict=True):
            row.copy_(part)
        total.addmm_(some, some.T)
    return total


def products_along(vectors: Sequence[Tensor], axis: int) -> Tensor:
    """Compute inner products of rows (`axis` 1) or columns (0): (vectors, vectors, rows or columns), float64."""
    exact = [vector.double() for vector in vectors]
    return torch.stack([torch.stack([(one * other).sum(axis) for other in exact]) for one in exact])
