"""`fisher`: every parameter weighted by its own Fisher information."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import GradientParameters
from worker.engine.catalog.methods.statistic import RunningModels, Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share

FISHER_VALUE_BYTES = 16  # for each parameter: its sum, its gradient and intermediate values


def _parameter_fisher_bytes(running: RunningModels) -> int:
    """Count the bytes of measuring a row at a time."""
    return running.activations(running.longest_row) + FISHER_VALUE_BYTES * max(running.models) // 4


PARAMETER_FISHER = Statistic("fisher", _parameter_fisher_bytes)
"""Fisher information of every parameter."""


class FisherParameters(GradientParameters):
    name: Literal["fisher"] = "fisher"
    normalize: bool = True
    """Whether each model's Fisher information is divided by its L2 norm over all merged parameters."""
    floor: PerTensor[Share] = 1e-6
    """Least Fisher information of a parameter, as a share of the mean over all merged parameters and models."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({PARAMETER_FISHER})

    @property
    def counts_scale(self) -> bool:
        return not self.normalize


FISHER = MethodEntry(
    name="fisher",
    formula="theta_i = theta_1,i + sum_j w_j,i (theta_j,i - theta_1,i), w_j,i = lambda_j F_j,i / sum_k lambda_k F_k,i",
    source="Matena & Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    needs=("dataset",),
    parameters=FisherParameters,
    search={"scale": Range(0.8, 1.25)},
)
