"""A sequence has one of several labels."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.primitives.errors import Place
from worker.engine.catalog.tasks.names import label_ids
from worker.engine.catalog.tasks.task import LabelMap, Task


class Classification(Task):
    """The label of a row is an id or a name."""

    name = "classification"
    ending = "ForSequenceClassification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")
    hub_metrics: ClassVar[Mapping[str, str]] = {"matthews": "matthews_correlation"}
    answers_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self | None:
        """Return the task; as in transformers, several outputs are classes unless the configuration says otherwise."""
        if outputs == 1 or info.config.get("problem_type") in ("multi_label_classification", "regression"):
            return None
        return cls(outputs, *label_ids(info, outputs))

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> int:
        return labels.id(label, source, place)

    def begins_at_one(self, labels: Sequence[Any]) -> bool:
        """Return whether no label is 0, and each other label occurs."""
        ids = set(labels)
        return not any(isinstance(one, str | bool) for one in ids) and ids == set(range(1, self.outputs))

    @property
    def f1_is_of_one(self) -> bool:
        return self.outputs == 2
