"""`ties`, see its catalog entry.

As in the authors' code the mean is over the models that agree; with weights it is `sum lambda t / sum lambda` over
them, which for equal weights is the same. `scale` is the paper's lambda, applied by the caller.
"""

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters, TiesParameters
from worker.engine.merging.methods.blocks import Block, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.selection import kept_elements, nth_largest
from worker.engine.merging.methods.task_vectors import Deltas, magnitudes, merging


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, TiesParameters):
        raise TypeError(f"parameters of ties expected, got {type(parameters).__name__}")
    of_models = [parameters.of_model(model.parameters) for model in models]

    def sparse(versions: Versions) -> Deltas:
        kept = [kept_elements(own.at("density", versions.place), versions.shape) for own in of_models]
        thresholds = nth_largest(versions, magnitudes, kept)

        def trimmed(block: Block) -> list[Tensor]:
            return [trim(delta, least) for delta, least in zip(block.deltas, thresholds, strict=True)]

        return trimmed

    return merging(parameters, models, sparse)


def trim(delta: Tensor, least: float) -> Tensor:
    """Set elements to zero whose magnitude is less than `least`, which is one of the magnitudes, and not NaN."""
    dtype = np.float64 if delta.dtype == torch.float64 else np.float32
    below = np.nextafter(dtype(least), dtype(-1))
    return torch.nn.functional.hardshrink(delta, float(below))  # magnitudes up to `below` become zero
