"""`dare_linear` and `dare_ties`: a random part of each task vector is dropped, and the rest is scaled up for it."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DroppingParameters, ElectionParameters, SumParameters


class DareLinearParameters(SumParameters, DroppingParameters):
    name: Literal["dare_linear"] = "dare_linear"


class DareTiesParameters(ElectionParameters, DroppingParameters):
    name: Literal["dare_ties"] = "dare_ties"


SOURCE = "Yu et al. 2024, Language Models are Super Mario, arXiv 2311.03099"

DARE_LINEAR = MethodEntry(
    name="dare_linear",
    formula="theta = theta_0 + scale * sum_j lambda_j m_j (theta_j - theta_0) / density, m_j ~ Bernoulli(density)",
    source=SOURCE,
    needs=("base",),
    parameters=DareLinearParameters,
    search={"density": Range(0.2, 0.95), "scale": Range(0.15, 1.0)},
)

DARE_TIES = MethodEntry(
    name="dare_ties",
    formula="theta = theta_0 + scale * sum_(j in A) lambda_j t_j / sum_(j in A) lambda_j, "
    "t_j = m_j (theta_j - theta_0) / density, m_j ~ Bernoulli(density), A = {j: sign(t_j) = sign(sum_k lambda_k t_k)}",
    source=f"{SOURCE}; the election is that of arXiv 2306.01708",
    needs=("base",),
    parameters=DareTiesParameters,
    search={"density": Range(0.2, 0.95), "scale": Range(0.5, 2.0)},
)
