"""`ties`: task vectors are trimmed, a sign is elected for every parameter, and values with that sign are averaged."""

from typing import ClassVar, Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import Density, ElectionParameters
from worker.engine.catalog.primitives.values import PerTensor


class TiesParameters(ElectionParameters):
    per_model: ClassVar[tuple[str, ...]] = ("density",)

    name: Literal["ties"] = "ties"
    density: PerTensor[Density] = 0.2
    """Share of each tensor's task vector that is kept: its largest magnitudes."""

    @property
    def selects_by_rank(self) -> bool:
        return True


TIES = MethodEntry(
    name="ties",
    formula="theta = theta_0 + scale * sum_(j in A) lambda_j t_j / sum_(j in A) lambda_j, "
    "t_j = trim(theta_j - theta_0), A = {j: sign(t_j) = sign(sum_k lambda_k t_k)}",
    source="Yadav et al. 2023, TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708; "
    "trimming per tensor is this project's",
    needs=("base",),
    parameters=TiesParameters,
    search={"density": Range(0.05, 0.9, log=True), "scale": Range(0.5, 2.0)},
)
