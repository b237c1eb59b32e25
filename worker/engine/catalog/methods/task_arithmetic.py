"""`task_arithmetic`: the base plus the scaled sum of the task vectors."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, Range
from worker.engine.catalog.methods.task_vectors import SumParameters


class TaskArithmeticParameters(SumParameters):
    name: Literal["task_arithmetic"] = "task_arithmetic"


TASK_ARITHMETIC = MethodEntry(
    name="task_arithmetic",
    formula="theta = theta_0 + scale * sum_j lambda_j (theta_j - theta_0)",
    source="Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089",
    needs=("base",),
    parameters=TaskArithmeticParameters,
    search={"scale": Range(0.15, 1.0)},
)
