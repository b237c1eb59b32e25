"""`esm`: the directions in which a task vector moves a layer's outputs most, turned so that models do not interfere."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import Choice, MethodEntry, Range
from worker.engine.catalog.methods.parameters import MeasuringParameters
from worker.engine.catalog.methods.regmean import GRAM
from worker.engine.catalog.methods.statistic import Statistic
from worker.engine.catalog.primitives.values import PerTensor

MATRICES = 8
"""Number of matrices (outputs, inputs) that are held in float64 while a layer is merged."""
SQUARES = 3
"""Number of matrices that are square in the outputs, or in the inputs, and held at the same time."""


class EsmParameters(MeasuringParameters):
    name: Literal["esm"] = "esm"
    rank: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Share of a layer's output directions that all N models together keep: each keeps `rank / N` of its own, and one
    at least."""
    power: PerTensor[Annotated[float, Field(ge=0, le=4)]] = 2.0
    """Power of the relative norms by which models, and then inputs, are scaled, so that large ones count for more; 0
    scales none."""

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({GRAM})

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def merges_rows(self) -> bool:
        return False

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return 8 * (MATRICES * outputs * inputs + SQUARES * max(outputs, inputs) ** 2)


ESM = MethodEntry(
    name="esm",
    formula="W = W_0 + scale * Q([P_1 ... P_N]) Q([A_1; ...; A_N] C), P_j = the first rank/N eigenvectors of "
    "D_j G_j D_j^T, D_j = W_j - W_0, G_j = mean x x^T, A_j = w_j s_j P_j^T D_j, s_j = (|D_j| / mean |D|)^power, "
    "C = the same of each column of all A_j, Q(X) = X (X^T X)^(-1/2) times the mean singular value of X, "
    "w_j = N lambda_j / sum_k lambda_k; tensors of no linear layer as average",
    source="Li et al. 2026, Model Merging in the Essential Subspace, arXiv 2602.20208",
    needs=("dataset", "base"),
    parameters=EsmParameters,
    search={"rank": Range(0.25, 1.0), "power": Choice((0.0, 2.0)), "scale": Range(0.5, 2.0)},
)
