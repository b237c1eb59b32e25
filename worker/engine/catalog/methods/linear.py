"""`linear`: every tensor's weighted sum."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, MethodParameters, Range


class LinearParameters(MethodParameters):
    name: Literal["linear"] = "linear"
    normalize: bool = True
    """The sum is divided by the sum of the weights; then it is `average`."""


LINEAR = MethodEntry(
    name="linear",
    formula="theta = sum_j lambda_j theta_j [/ sum_k lambda_k]",
    source="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
    needs=(),
    parameters=LinearParameters,
    search={"scale": Range(0.8, 1.25)},
)
