"""`nuslerp`: `slerp` by the models' weights, of whole tensors, rows or columns, or of task vectors."""

from typing import ClassVar, Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters


class NuSlerpParameters(MethodParameters):
    name: Literal["nuslerp"] = "nuslerp"
    vectors: Literal["tensor", "rows", "columns"] = "tensor"
    """Part of a tensor that is interpolated as one vector: all of it, each slice along the first axis (`rows`, the
    weights of one output), or each column of the matrix of these (`columns`). Tensors of one axis or none are one
    vector."""

    takes_negative_weights: ClassVar[bool] = True


NUSLERP = MethodEntry(
    name="nuslerp",
    formula="theta = slerp(theta_1, theta_2; t = lambda_2 / (lambda_1 + lambda_2), or 1/2 where they add up to 0), and "
    "with a base theta_0 + slerp(theta_1 - theta_0, theta_2 - theta_0; t)",
    source="mergekit's method of this name; Shoemake 1985, doi 10.1145/325165.325242",
    needs=(),
    parameters=NuSlerpParameters,
    models=(2, 2),
    search={"scale": Range(0.8, 1.25)},
)
