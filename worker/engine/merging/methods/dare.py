"""`dare_linear` and `dare_ties`, see their catalog entries."""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.catalog.methods import DroppingParameters, MethodParameters
from worker.engine.merging.methods.blocks import Block, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.task_vectors import Deltas, merging


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, DroppingParameters):
        raise TypeError(f"parameters of DARE expected, got {type(parameters).__name__}")
    of_models = [parameters.of_model(model.parameters) for model in models]

    def sparse(versions: Versions) -> Deltas:
        densities = [own.at("density", versions.place) for own in of_models]

        def dropped(block: Block) -> list[Tensor]:
            deltas = block.deltas
            for model, (delta, density) in enumerate(zip(deltas, densities, strict=True)):
                kept = draw(generator(parameters.seed, model, versions.slot.name, block), delta.numel(), density)
                delta.mul_(torch.from_numpy(kept).view_as(delta)).div_(density)
            return deltas

        return dropped

    return merging(parameters, models, sparse)


def generator(seed: int, model: int, tensor: str, block: Block) -> np.random.Generator:
    """Make the generator of a model's random numbers in a block.

    The numbers are the same in whichever order and thread blocks are merged. They depend on the row where the block
    begins, and so on the size of blocks, and on no property of the models but `model`. PyTorch's own generator would
    take longer than all the rest of a merge.

    Args:
        model: place of the model, from 0, among those that take part; models of weight 0 do not count.
        tensor: name of the tensor in the merged model.
    """
    digest = hashlib.sha256(f"{seed} {model} {block.rows.start} {tensor}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest)))


def draw(random: np.random.Generator, count: int, probability: float) -> NDArray[np.float32]:
    """Draw numbers that are 1 with the probability, else 0.

    Each number takes 8 random bits, and only the few that these do not decide take more.
    """
    whole = math.floor(256 * probability)
    bits = raw_bits(random, count, np.uint8)
    drawn = bits < whole
    open_ = np.flatnonzero(bits == whole)
    drawn[open_] = random.random(len(open_)) < 256 * probability - whole
    return drawn.astype(np.float32)


def raw_bits(random: np.random.Generator, count: int, dtype: Any) -> NDArray[Any]:
    """Draw numbers from the generator's own stream, which is the same in every version of NumPy."""
    size = np.dtype(dtype).itemsize
    raw: NDArray[np.uint64] = random.bit_generator.random_raw(-(-count * size // 8))
    view: NDArray[Any] = raw.view(dtype)
    return view[:count]
