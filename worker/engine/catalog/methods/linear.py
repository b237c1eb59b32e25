"""`linear`: every tensor's weighted sum."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters, cancels


class LinearParameters(MethodParameters):
    name: Literal["linear"] = "linear"
    normalize: bool = True
    """Whether the sum is divided by the sum of the weights; then it is `average`."""

    takes_negative_weights: ClassVar[bool] = True

    def weights_problem(self, weights: Sequence[float]) -> str | None:
        if any(weights) and self.normalize and cancels(weights):
            return "the weights add up to 0, by which they are to be divided (normalize),"
        return super().weights_problem(weights)


LINEAR = MethodEntry(
    name="linear",
    formula="theta = sum_j lambda_j theta_j [/ sum_k lambda_k]",
    source="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
    needs=(),
    parameters=LinearParameters,
    search={"scale": Range(0.8, 1.25)},
)
