"""`iso_cts`: as `iso_c`, with directions of single task vectors in place of the sum's least."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import MatrixParameters
from worker.engine.catalog.primitives.values import PerTensor


class IsoCtsParameters(MatrixParameters):
    matrices: ClassVar[int] = 16

    name: Literal["iso_cts"] = "iso_cts"
    common: PerTensor[Annotated[float, Field(ge=0, le=1)]] = 0.8
    """Share of a matrix's directions that are the sum's; the others are shared evenly among the models."""


ISO_CTS = MethodEntry(
    name="iso_cts",
    formula="W = W_0 + scale * mean(s) P([U_1 ... U_N U]) P([V_1 ... V_N V])^T, U diag(s_0) V^T = the largest singular "
    "components of D = sum_j w_j (W_j - W_0), U_j diag(s_j) V_j^T = those of (I - U U^T) w_j (W_j - W_0), "
    "s = (s_1 ... s_N s_0), P(X) = X (X^T X)^(-1/2), w_j = N lambda_j / sum_k lambda_k; tensors of no linear layer as "
    "average",
    source="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, "
    "arXiv 2502.04959",
    needs=("base",),
    parameters=IsoCtsParameters,
    search={"common": Range(0.5, 1.0), "scale": Range(0.3, 3.0, log=True)},
)
