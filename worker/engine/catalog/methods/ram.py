"""`ram` and `ramplus_tl`: each element of the task vectors is averaged over the models that change it."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DataDecidesParameters
from worker.engine.catalog.primitives.values import PerTensor


class RamParameters(DataDecidesParameters):
    name: Literal["ram"] = "ram"
    epsilon: PerTensor[Annotated[float, Field(ge=0, le=1e6)]] = 1e-5
    """Difference from the base above which a model counts as changing an element."""


class RamPlusParameters(DataDecidesParameters):
    name: Literal["ramplus_tl"] = "ramplus_tl"
    epsilon: PerTensor[Annotated[float, Field(ge=0, le=1e6)]] = 1e-5
    """Difference from the base above which a model counts as changing an element."""
    r: PerTensor[Annotated[float, Field(ge=-10, le=10)]] = 0.1
    """Amplification of changes that a single model makes, for each unit of `rho`."""
    alpha: PerTensor[Annotated[float, Field(ge=0, le=1e6)]] = 0.2
    """Upper limit of `rho`."""


SOURCE = "Reinforced Agent Merging (RAM) 2026, arXiv 2601.13572"
CHANGES = "t_j = theta_j - theta_0 where |theta_j - theta_0| > epsilon, else 0, c = how many t_j are not 0, per element"

RAM = MethodEntry(
    name="ram",
    formula=f"theta = theta_0 + sum_j t_j / max(1, c), {CHANGES}",
    source=SOURCE,
    needs=("base",),
    parameters=RamParameters,
    search={"scale": Range(0.5, 2.0)},
)

RAMPLUS_TL = MethodEntry(
    name="ramplus_tl",
    formula="theta = theta_0 + sum_j t_j / c where c > 1, theta_0 + (1 + r min(rho_j, alpha)) t_j where j alone "
    f"changes it, rho_j = elements of the tensor that j changes and others too / those that j alone changes, {CHANGES}",
    source=f"{SOURCE}; with the ratio of each tensor by itself, as in mergekit 0.1.5",
    needs=("base",),
    parameters=RamPlusParameters,
    search={"r": Range(0.0, 1.0), "scale": Range(0.5, 2.0)},
)
