"""`multislerp`: the weighted mean of several models' directions, with the weighted mean of their lengths."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters, cancels


class MultiSlerpParameters(MethodParameters):
    name: Literal["multislerp"] = "multislerp"
    normalize_weights: bool = True
    """Whether the weights are divided by their sum."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Number added to lengths before dividing by them; a mean direction that is shorter counts as none."""

    takes_negative_weights: ClassVar[bool] = True

    def weights_problem(self, weights: Sequence[float]) -> str | None:
        if any(weights) and self.normalize_weights and cancels(weights):
            return "the weights add up to 0, by which they are to be divided (normalize_weights),"
        return super().weights_problem(weights)


MULTISLERP = MethodEntry(
    name="multislerp",
    formula="theta = [sum_j w_j |theta_j|] m / |m|, m = sum_j w_j theta_j / (|theta_j| + eps), "
    "w_j = lambda_j [/ sum_k lambda_k], of each tensor, and with a base of theta_j - theta_0, which is added again; "
    "two models of which |m| < eps: theta = sum_j w_j theta_j; one model: itself",
    source="Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea. There the mean of the models in the "
    "tangent space at m is added, which is 0, since m is their mean with the same weights",
    needs=(),
    parameters=MultiSlerpParameters,
    search={"scale": Range(0.8, 1.25)},
)
