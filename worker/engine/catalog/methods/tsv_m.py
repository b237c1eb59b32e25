"""`tsv_m`: the largest singular components of every task vector, turned so that those of all models are orthogonal."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import MatrixParameters
from worker.engine.catalog.primitives.values import PerTensor


class TsvMParameters(MatrixParameters):
    matrices: ClassVar[int] = 16

    name: Literal["tsv_m"] = "tsv_m"
    rank: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Share of a matrix's singular components that all N models together keep: each keeps `rank / N` of its own, and
    one at least."""


TSV_M = MethodEntry(
    name="tsv_m",
    formula="W = W_0 + scale * P([U_1 ... U_N]) diag(w_1 s_1 ... w_N s_N) P([V_1 ... V_N])^T, "
    "U_j diag(s_j) V_j^T = the largest rank/N of the singular components of W_j - W_0, P(X) = X (X^T X)^(-1/2), "
    "w_j = N lambda_j / sum_k lambda_k; tensors of no linear layer as average",
    source="Gargiulo et al. 2024, Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081",
    needs=("base",),
    parameters=TsvMParameters,
    search={"rank": Range(0.25, 1.0), "scale": Range(0.5, 2.0)},
)
