"""What a checkpoint predicts, and how a data set's labels are its labels."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from worker.engine.catalog.errors import InvalidCheckpoint, InvalidDataset
from worker.engine.catalog.headers import CheckpointInfo
from worker.engine.catalog.spec import MetricName
from worker.engine.catalog.strict import did_you_mean


@dataclass(frozen=True)
class Task:
    """A head's task. `outputs` is the width of the logits."""

    problem: Literal["classification", "regression"]
    outputs: int
    label_ids: dict[str, int]


def task_of(info: CheckpointInfo) -> Task:
    """The task of a sequence classification checkpoint, from its configuration.

    As in transformers: one output, or `problem_type` regression, is regression.

    Raises:
        InvalidCheckpoint: multi-label heads and regression with several outputs are not available.
    """
    config = info.config
    names = config.get("id2label") or {}
    outputs = len(names) if names else config.get("num_labels", 2)
    head = info.tensors.get("classifier.weight")
    if head is not None and head.shape[:1] != (outputs,):
        raise InvalidCheckpoint(
            info.source, f"config.json names {outputs} labels, classifier.weight has shape {list(head.shape)}"
        )
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        raise InvalidCheckpoint(info.source, "problem_type multi_label_classification is not available yet")
    if outputs == 1 or problem == "regression":
        if outputs != 1:
            raise InvalidCheckpoint(info.source, f"regression with {outputs} outputs is not available yet")
        return Task("regression", 1, {})
    label_ids = {str(name): int(index) for name, index in (config.get("label2id") or {}).items()}
    return Task("classification", outputs, label_ids)


METRICS: dict[str, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


def check_metric(metric: MetricName, task: Task, source: str) -> None:
    """Raises InvalidDataset when the metric is not one of the head's task."""
    available = METRICS[task.problem]
    if metric not in available:
        raise InvalidDataset(source, f"metric {metric} is not one of {task.problem}: {', '.join(available)}")


@dataclass(frozen=True)
class LabelMap:
    """From a row's label to the head's: a class id, or a number for regression.

    Integers are the checkpoint's own ids, unless `names` says what the data set calls them: then a label, number or
    name, is looked up by name in the checkpoint's label2id.
    """

    task: Task
    names: tuple[str, ...] | None = None

    def value(self, label: Any, source: str, line: int) -> int | float:
        """The head's value of a row's `label`.

        Raises:
            InvalidDataset: the label is missing, unknown or out of range.
        """
        if self.task.problem == "regression":
            if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
                raise InvalidDataset(source, "the label of a regression is a finite number", line=line)
            return float(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, str):
            return self._by_name(label, source, line)
        if not isinstance(label, int):
            raise InvalidDataset(source, f"the label is {type(label).__name__}, not an id or a name", line=line)
        count = self.task.outputs if self.names is None else len(self.names)
        if not 0 <= label < count:
            raise InvalidDataset(source, f"label {int(label)} is out of range: ids are 0 to {count - 1}", line=line)
        return int(label) if self.names is None else self._by_name(self.names[label], source, line)

    def _by_name(self, name: str, source: str, line: int) -> int:
        ids = self.task.label_ids
        if name not in ids:
            # Labels are a closed set that the data set's owner chose, so naming one gives no row's text away.
            raise InvalidDataset(source, f"label '{name[:64]}' is unknown{did_you_mean(name, list(ids))}", line=line)
        return ids[name]
