"""`regmean`: each linear layer's outputs are as near as possible to every model's own, on the model's own inputs."""

from collections.abc import Mapping
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
    gram: Literal["rows", "deltas"] = "rows"
    """Source of the Gram matrices: `rows` measures them on every model's rows; `deltas` estimates each by the task
    vector of the layer itself, which needs a base and no rows."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return super().statistics if self.gram == "rows" else frozenset()

    @property
    def most_examples(self) -> int:
        return super().most_examples if self.gram == "rows" else 0

    @property
    def idle(self) -> Mapping[str, str]:
        return {} if self.gram == "rows" else {"examples": "counts rows to measure, and gram 'deltas' reads none"}

    @property
    def needs_base(self) -> bool:
        return self.gram == "deltas" or super().needs_base

    @property
    def needs_base_by(self) -> str:
        return "gram 'deltas'" if self.gram == "deltas" else super().needs_base_by

    @property
    def needs_table(self) -> bool:
        return self.gram == "deltas"

    @property
    def estimated(self) -> str | None:
        return "Gram matrices of the inputs of linear layers" if self.gram == "deltas" else None

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return GRAM_MATRICES * 8 * inputs**2 if self.gram == "deltas" else 0


REGMEAN = MethodEntry(
    name="regmean",
    formula="W = W_1 + [sum_j lambda_j (W_j - W_1) G_j] [sum_j lambda_j G_j]^-1, G_j = mean x x^T, or with "
    "gram 'deltas' (W_j - W_0)^T (W_j - W_0); others as average",
    source="Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849; "
    "deltas: Hameed et al. 2026, Model Merging via Data-Free Covariance Estimation, arXiv 2604.01329",
    needs=("dataset",),
    parameters=RegMeanParameters,
    search={"shrink": Range(0.8, 1.0), "ridge": Range(1e-4, 1e-1, log=True), "scale": Range(0.8, 1.25)},
)
