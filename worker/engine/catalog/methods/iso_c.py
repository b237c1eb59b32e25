"""`iso_c`: the sum of the task vectors, with one singular value for all of its directions."""

from typing import ClassVar, Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import MatrixParameters


class IsoCParameters(MatrixParameters):
    matrices: ClassVar[int] = 8

    name: Literal["iso_c"] = "iso_c"


ISO_C = MethodEntry(
    name="iso_c",
    formula="W = W_0 + scale * mean(s) U V^T, U diag(s) V^T = sum_j w_j (W_j - W_0), "
    "w_j = N lambda_j / sum_k lambda_k; tensors of no linear layer as average",
    source="Marczak et al. 2025, No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, "
    "arXiv 2502.04959",
    needs=("base",),
    parameters=IsoCParameters,
    search={"scale": Range(0.3, 3.0, log=True)},
)
