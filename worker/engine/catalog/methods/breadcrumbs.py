"""`breadcrumbs` and `breadcrumbs_ties`: task vectors without their outliers and without their small changes."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import (
    Density,
    ElectionParameters,
    SumParameters,
    TaskVectorParameters,
)
from worker.engine.catalog.primitives.values import PerTensor


class MaskingParameters(TaskVectorParameters):
    per_model: ClassVar[tuple[str, ...]] = ("density", "gamma")

    density: PerTensor[Density] = 0.15
    """Share of each tensor's task vector that is kept: the largest magnitudes after those that `gamma` drops."""
    gamma: PerTensor[Annotated[float, Field(ge=0, lt=1)]] = 0.01
    """Share of each tensor's task vector that is dropped as its largest magnitudes; less where density leaves less."""

    @property
    def selects_by_rank(self) -> bool:
        return True


class BreadcrumbsParameters(SumParameters, MaskingParameters):
    name: Literal["breadcrumbs"] = "breadcrumbs"


class BreadcrumbsTiesParameters(ElectionParameters, MaskingParameters):
    name: Literal["breadcrumbs_ties"] = "breadcrumbs_ties"


SOURCE = "Davari & Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795"
MASKED = "t_j = theta_j - theta_0 where its magnitude has a rank in (gamma n, (gamma + density) n] of n, else 0"

BREADCRUMBS = MethodEntry(
    name="breadcrumbs",
    formula=f"theta = theta_0 + scale * sum_j lambda_j t_j, {MASKED}",
    source=SOURCE,
    needs=("base",),
    parameters=BreadcrumbsParameters,
    search={"density": Range(0.1, 0.95), "scale": Range(0.15, 1.0)},
)

BREADCRUMBS_TIES = MethodEntry(
    name="breadcrumbs_ties",
    formula="theta = theta_0 + scale * sum_(j in A) lambda_j t_j / sum_(j in A) lambda_j, "
    f"A = {{j: sign(t_j) = sign(sum_k lambda_k t_k)}}, {MASKED}",
    source=f"{SOURCE}; the election is that of arXiv 2306.01708",
    needs=("base",),
    parameters=BreadcrumbsTiesParameters,
    search={"density": Range(0.1, 0.95), "scale": Range(0.5, 2.0)},
)
