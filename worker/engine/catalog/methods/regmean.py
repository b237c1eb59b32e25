"""`regmean`: each linear layer's outputs are as near as possible to every model's own, on the model's own inputs."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MeasuringParameters
from worker.engine.catalog.methods.statistic import RunningModels, Statistic
from worker.engine.catalog.primitives.values import PerTensor, Share

SHRINK = 1.0
RIDGE = 1e-3
GRAM_BYTES = 500_000_000  # sums of Gram matrices held at once; those of a larger model take several passes
GRAM_MATRICES = 6  # held in float64 while a layer is merged: the sum, its factor, one model's, and intermediate ones


def _sums_bytes(running: RunningModels) -> int:
    """Count the bytes of sums in one pass, and of a copy of the widest input."""
    matrices = [8 * width**2 for width in running.input_widths]
    return min(sum(matrices), max(GRAM_BYTES, max(matrices))) + 4 * running.tokens * max(running.input_widths)


def _gram_bytes(running: RunningModels) -> int:
    """Count the bytes of sums and a forward pass, or, if that is more, of solving for the largest layer later."""
    return max(running.batch + _sums_bytes(running), GRAM_MATRICES * 8 * max(running.input_widths) ** 2)


GRAM = Statistic("gram", _gram_bytes, _sums_bytes)
"""Gram matrices of the inputs of linear layers."""


class RegressionParameters(MeasuringParameters):
    """Parameters of methods that start from the regression of `regmean`."""

    shrink: PerTensor[Share] = SHRINK
    """Factor of the off-diagonal entries of the Gram matrices."""
    ridge: PerTensor[Share] = RIDGE
    """Number added to the diagonals of the Gram matrices, as a share of the models' mean diagonal entry."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({GRAM})

    @property
    def merges_rows(self) -> bool:
        return False


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
