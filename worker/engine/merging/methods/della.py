"""`della` and `della_linear`, see their catalog entries."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.catalog.methods import DellaDroppingParameters, MethodParameters
from worker.engine.merging.methods.blocks import CHUNK_ELEMENTS, Block, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.dare import generator, raw_bits
from worker.engine.merging.methods.task_vectors import Deltas, merging

LEAST = 2.0**-32  # least probability with which an element is kept


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, DellaDroppingParameters):
        raise TypeError(f"parameters of DELLA expected, got {type(parameters).__name__}")
    of_models = [parameters.of_model(model.parameters) for model in models]

    def sparse(versions: Versions) -> Deltas:
        place = versions.place
        settings = [(own.at("density", place), own.at("epsilon", place)) for own in of_models]

        def dropped(block: Block) -> list[Tensor]:
            deltas = block.deltas
            for model, (delta, (density, epsilon)) in enumerate(zip(deltas, settings, strict=True)):
                rows = (delta.flatten(1) if delta.dim() > 1 else delta.view(1, -1)).numpy()
                random = generator(parameters.seed, model, versions.slot.name, block)
                delta.mul_(torch.from_numpy(keep_factors(random, rows, density, epsilon)).view_as(delta))
            return deltas

        return dropped

    return merging(parameters, models, sparse)


def keep_factors(
    random: np.random.Generator, rows: NDArray[np.floating], density: float, epsilon: float
) -> NDArray[np.float32]:
    """Draw the factor of each element: 0, or 1 over the probability that it is kept.

    The probability rises with the rank of its magnitude in its row. Among equal ones in float32 the first ranks lower.

    Args:
        rows: (rows, elements). The only element of a row has the probability `density`.
    """
    count = rows.shape[1]
    spread = min(epsilon, density, 1 - density)
    probabilities = density + spread * (np.linspace(-1, 1, count) if count > 1 else np.zeros(count))
    limits = (probabilities * 2.0**32).astype(np.uint64)
    inverse = (1 / np.maximum(probabilities, LEAST)).astype(np.float32)
    columns = np.arange(count, dtype=np.uint64)
    factors = np.empty(rows.shape, np.float32)
    step = max(1, CHUNK_ELEMENTS // max(1, count))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        # Numbers that are not negative sort like their bits; with the place behind these, equal ones keep their order.
        keys = np.abs(some).astype(np.float32).view(np.uint32).astype(np.uint64)
        keys <<= 32
        keys |= columns
        keys.sort(axis=1)
        keys &= 0xFFFFFFFF
        keys += np.arange(len(some), dtype=np.uint64)[:, None] * count
        by_rank = np.where(raw_bits(random, some.size, np.uint32).reshape(some.shape) < limits, inverse, 0)
        factors[start : start + step].reshape(-1)[keys.view(np.int64)] = by_rank
    return factors
