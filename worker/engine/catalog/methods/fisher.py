"""`fisher`: every parameter weighted by its own Fisher information."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import GradientParameters, Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share


class FisherParameters(GradientParameters):
    name: Literal["fisher"] = "fisher"
    normalize: bool = True
    """Whether each model's Fisher information is divided by its L2 norm over all merged parameters."""
    floor: PerTensor[Share] = 1e-6
    """Least Fisher information of a parameter, as a share of the mean over all merged parameters and models."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.FISHER})


FISHER = MethodEntry(
    name="fisher",
    formula="theta_i = theta_1,i + sum_j w_j,i (theta_j,i - theta_1,i), w_j,i = lambda_j F_j,i / sum_k lambda_k F_k,i",
    source="Matena & Raffel 2022, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    needs=("dataset",),
    parameters=FisherParameters,
    search={"scale": Range(0.8, 1.25)},
)
