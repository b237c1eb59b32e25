"""`della` and `della_linear`, see their catalog entries."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.catalog.methods import (
    DELLA_EPSILON,
    DROPPING_DENSITY,
    DellaDroppingParameters,
    MethodParameters,
)
from worker.engine.catalog.values import value_at
from worker.engine.methods.blocks import Block, MeasuredModel, Merger, Versions
from worker.engine.methods.dare import generator, raw_bits
from worker.engine.methods.task_vectors import Deltas, merging


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, DellaDroppingParameters):
        raise TypeError(f"parameters of DELLA expected, got {type(parameters).__name__}")

    def sparse(versions: Versions) -> Deltas:
        density = value_at(parameters.density, versions.place, DROPPING_DENSITY)
        epsilon = value_at(parameters.epsilon, versions.place, DELLA_EPSILON)

        def dropped(block: Block) -> list[Tensor]:
            deltas = block.deltas
            for model, delta in enumerate(deltas):
                rows = delta.numpy().reshape(len(delta) if delta.dim() > 1 else 1, -1)
                probabilities = keep_probabilities(rows, density, epsilon)
                bits = raw_bits(generator(parameters.seed, model, versions.slot.name, block), rows.size, np.uint32)
                kept = bits.reshape(rows.shape) < probabilities * 2.0**32
                factors = np.divide(1, probabilities, out=np.zeros_like(probabilities), where=kept)
                delta.mul_(torch.from_numpy(factors).view_as(delta))
            return deltas

        return dropped

    return merging(parameters, models, sparse)


def keep_probabilities(rows: NDArray[np.floating], density: float, epsilon: float) -> NDArray[np.float64]:
    """By rank of magnitude in its row, the smallest first; of equal ones, compared in float32, the first has the lower.

    Args:
        rows: (rows, elements). The only element of a row has the probability `density`.
    """
    count = rows.shape[1]
    spread = min(epsilon, density, 1 - density)
    by_rank = density + spread * (np.linspace(-1, 1, count) if count > 1 else np.zeros(count))
    # The bits of what is not negative are in its own order; with the place behind them, sorting keeps that too.
    keys = np.abs(rows).astype(np.float32).view(np.uint32).astype(np.uint64)
    keys <<= 32
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort(axis=1)
    places = (keys & 0xFFFFFFFF).astype(np.int64)
    probabilities = np.empty(rows.shape)
    np.put_along_axis(probabilities, places, by_rank[None].repeat(len(rows), 0), axis=1)
    return probabilities
