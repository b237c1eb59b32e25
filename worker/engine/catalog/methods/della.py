"""`della` and `della_linear`: a random part of each task vector is dropped, smaller magnitudes more often."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DroppingParameters, ElectionParameters, SumParameters
from worker.engine.catalog.primitives.values import PerTensor


class DellaDroppingParameters(DroppingParameters):
    per_model: ClassVar[tuple[str, ...]] = ("density", "epsilon")

    epsilon: PerTensor[Annotated[float, Field(ge=0, le=0.5)]] = 0.15
    """Spread of the probability that an element is kept: from density - epsilon for the smallest magnitude in its row
    to density + epsilon for the largest. It is at most the distance of the density from 0 and from 1."""


class DellaParameters(ElectionParameters, DellaDroppingParameters):
    name: Literal["della"] = "della"


class DellaLinearParameters(SumParameters, DellaDroppingParameters):
    name: Literal["della_linear"] = "della_linear"


SOURCE = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"
DROPPED = (
    "t_j = m_j (theta_j - theta_0) / p_j, m_j ~ Bernoulli(p_j), "
    "p_j = density + epsilon (2 (r - 1) / (n - 1) - 1) for the element of rank r by magnitude among the n of its row"
)

DELLA = MethodEntry(
    name="della",
    formula="theta = theta_0 + scale * sum_(j in A) lambda_j t_j / sum_(j in A) lambda_j, "
    f"A = {{j: sign(t_j) = sign(sum_k lambda_k t_k)}}, {DROPPED}",
    source=SOURCE,
    needs=("base",),
    parameters=DellaParameters,
    search={"density": Range(0.3, 0.85), "scale": Range(0.5, 2.0)},
)

DELLA_LINEAR = MethodEntry(
    name="della_linear",
    formula=f"theta = theta_0 + scale * sum_j lambda_j t_j, {DROPPED}",
    source=SOURCE,
    needs=("base",),
    parameters=DellaLinearParameters,
    search={"density": Range(0.3, 0.85), "scale": Range(0.15, 1.0)},
)
