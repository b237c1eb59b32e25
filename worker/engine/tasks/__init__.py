"""What the engine does with what a checkpoint predicts, one file for each kind of head in the catalog's tasks."""

from typing import Any

from worker.engine.catalog.tasks import TASKS, Classification, MultiLabel, Regression, Task
from worker.engine.tasks.classification import ClassificationHead
from worker.engine.tasks.kind import EstimatorName, HeadKind
from worker.engine.tasks.multi_label import MultiLabelHead
from worker.engine.tasks.regression import RegressionHead

KINDS: dict[type[Task], type[HeadKind[Any]]] = {
    Classification: ClassificationHead,
    MultiLabel: MultiLabelHead,
    Regression: RegressionHead,
}
if set(TASKS) != KINDS.keys():
    raise TypeError("the catalog's tasks are not those that the engine knows")


def kind_of(task: Task) -> HeadKind[Any]:
    """The head of a task, as the engine runs it."""
    return KINDS[type(task)](task)


__all__ = ["EstimatorName", "HeadKind", "kind_of"]
