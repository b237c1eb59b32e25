"""A sequence has a number."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.tasks.names import number_in
from worker.engine.catalog.tasks.task import LabelMap, Task


class Regression(Task):
    """The label of a row is a finite number."""

    name = "regression"
    ending = "ForSequenceClassification"
    metrics = ("pearson", "spearman")
    hub_metrics: ClassVar[Mapping[str, str]] = {"pearson": "pearsonr", "spearman": "spearmanr"}
    has_classes = False
    answers_rows = True

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self | None:
        """Return the task; as in transformers, one output is regression unless the configuration says otherwise."""
        if outputs != 1 and info.config.get("problem_type") != "regression":
            return None
        if outputs != 1:
            raise InvalidCheckpoint(info.source, f"regression with {outputs} outputs is not available yet")
        return cls(1, {})

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> float:
        value = number_in(label)
        if value is None:
            raise InvalidDataset(source, "the label of a regression is a finite number", place)
        return value
