"""`sce`: task vectors where they differ most between models, weighted by their size, without minority signs."""

from typing import Annotated, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import DataDecidesParameters
from worker.engine.catalog.primitives.values import PerTensor


class SceParameters(DataDecidesParameters):
    name: Literal["sce"] = "sce"
    select_topk: PerTensor[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Share of each tensor's elements that are merged: those that vary most between the models' task vectors."""

    @property
    def selects_by_rank(self) -> bool:
        return True


SCE = MethodEntry(
    name="sce",
    formula="theta = theta_0 + scale * sum_(j in A) w_j t_j / sum_(j in A) w_j, t_j = theta_j - theta_0 where its "
    "variance over the models is among the largest, else 0, w_j = |t_j|^2, A = {j: sign(t_j) = sign(sum_k t_k)}",
    source="Wan et al. 2024, FuseChat: Knowledge Fusion of Chat Models, arXiv 2408.07990",
    needs=("base",),
    parameters=SceParameters,
    search={"scale": Range(0.5, 2.0)},
)
