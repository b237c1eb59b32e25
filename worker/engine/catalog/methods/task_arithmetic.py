"""`task_arithmetic`: the base plus the scaled sum of the task vectors."""

from typing import Literal

from worker.engine.catalog.methods.entry import MethodEntry, MethodParameters, Scale
from worker.engine.catalog.values import PerTensor


class TaskArithmeticParameters(MethodParameters):
    name: Literal["task_arithmetic"] = "task_arithmetic"
    scale: PerTensor[Scale] = 0.4
    """Multiplies the sum of the task vectors. The paper finds 0.3 to 0.5 close to optimal in many cases."""

    @property
    def needs_base(self) -> bool:
        return True


TASK_ARITHMETIC = MethodEntry(
    name="task_arithmetic",
    formula="theta = theta_0 + scale * sum_j lambda_j (theta_j - theta_0)",
    source="Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089",
    needs=("base",),
    parameters=TaskArithmeticParameters,
)
