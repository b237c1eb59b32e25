"""`average`: every tensor's weighted mean."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.parameters import MethodParameters


class AverageParameters(MethodParameters):
    name: Literal["average"] = "average"


AVERAGE = MethodEntry(
    name="average",
    formula="theta = sum_j lambda_j theta_j / sum_k lambda_k",
    source="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
    needs=(),
    parameters=AverageParameters,
    search={"scale": Range(0.8, 1.25)},
)
