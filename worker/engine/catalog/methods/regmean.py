"""`regmean`: each linear layer's outputs are as near as possible to every model's own, on the model's own inputs."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MeasuringParameters, Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share

SHRINK = 1.0
RIDGE = 1e-3


class RegressionParameters(MeasuringParameters):
    """Parameters of methods that start from the regression of `regmean`."""

    shrink: PerTensor[Share] = SHRINK
    """Factor of the off-diagonal entries of the Gram matrices."""
    ridge: PerTensor[Share] = RIDGE
    """Number added to the diagonals of the Gram matrices, as a share of the models' mean diagonal entry."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({Statistic.GRAM})


class RegMeanParameters(RegressionParameters):
    name: Literal["regmean"] = "regmean"


REGMEAN = MethodEntry(
    name="regmean",
    formula="W = W_1 + [sum_j lambda_j (W_j - W_1) G_j] [sum_j lambda_j G_j]^-1, G_j = mean x x^T; others as average",
    source="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849",
    needs=("dataset",),
    parameters=RegMeanParameters,
    search={"shrink": Range(0.8, 1.0), "ridge": Range(1e-4, 1e-1, log=True), "scale": Range(0.8, 1.25)},
)
