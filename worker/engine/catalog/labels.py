"""What a checkpoint predicts, and how a data set's labels are its labels."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from worker.engine.catalog.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.headers import CheckpointInfo
from worker.engine.catalog.spec import MetricName
from worker.engine.catalog.strict import did_you_mean

Label = int | float | tuple[float, ...]
"""A class id, a number, or, of a multi-label head, 1 for each label that applies and 0 for each other."""
NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d{0,300})?([eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Task:
    """A head's task. `outputs` is the width of the logits."""

    problem: Literal["classification", "multi_label", "regression"]
    outputs: int
    label_ids: dict[str, int]


def task_of(info: CheckpointInfo) -> Task:
    """The task of a sequence classification checkpoint, from its configuration.

    As in transformers: what `problem_type` says; without it, one output is regression.

    Raises:
        InvalidCheckpoint: regression with several outputs is not available.
    """
    config, family = info.config, FAMILIES[info.model_type]
    names = _labels(info, "id2label")
    outputs = len(names) if names else config.get("num_labels", 2)
    for module in family.heads:
        if f"{module}.weight" not in info.tensors:
            raise InvalidCheckpoint(info.source, f"no tensor {module}.weight, which {info.architecture} needs")
    logits = info.tensors[f"{family.logits}.weight"]
    if logits.shape[:1] != (outputs,):
        raise InvalidCheckpoint(
            info.source, f"config.json names {outputs} labels, {logits.name} has shape {list(logits.shape)}"
        )
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        return Task("multi_label", outputs, _label_ids(info, names, outputs))
    if outputs == 1 or problem == "regression":
        if outputs != 1:
            raise InvalidCheckpoint(info.source, f"regression with {outputs} outputs is not available yet")
        return Task("regression", 1, {})
    return Task("classification", outputs, _label_ids(info, names, outputs))


def _labels(info: CheckpointInfo, key: str) -> dict[str, Any]:
    labels = info.config.get(key) or {}
    if not isinstance(labels, dict):
        raise InvalidCheckpoint(info.source, f"config.json has {key} that is no object")
    return labels


def _label_ids(info: CheckpointInfo, names: dict[str, Any], outputs: int) -> dict[str, int]:
    """Name → id, from label2id, else id2label, else the names that transformers gives."""
    ids = _labels(info, "label2id")
    if not ids and names:
        ids = {str(name): index for index, name in names.items()}
    if not ids:
        ids = {f"LABEL_{index}": index for index in range(outputs)}
    found = {}
    for name, index in ids.items():
        number = str(index)
        if not (number.isdecimal() and len(number) < 10 and int(number) < outputs):
            raise InvalidCheckpoint(
                info.source, f"config.json has label2id '{name}' = {number}; ids are 0 to {outputs - 1}"
            )
        found[name] = int(number)
    return found


METRICS: dict[str, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "multi_label": ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
}


def check_metric(metric: MetricName, task: Task, source: str) -> None:
    """Raises InvalidDataset when the metric is not one of the head's task."""
    available = METRICS[task.problem]
    if metric not in available:
        raise InvalidDataset(source, f"metric {metric} is not one of {task.problem}: {', '.join(available)}")


@dataclass(frozen=True)
class LabelMap:
    """From a row's label to the head's.

    Integers are the checkpoint's own ids, unless `names` says what the data set calls them: then a label, number or
    name, is looked up by name in the checkpoint's label2id. Of a multi-label head a row has a list of ids or names, of
    those that apply, or else 0.0 or 1.0 (or false or true) for every label.
    """

    task: Task
    names: tuple[str, ...] | None = None

    def value(self, label: Any, source: str, place: Place) -> Label:
        """The head's value of a row's `label`. Text that is no name counts as the number that it spells, as in CSV.

        Raises:
            InvalidDataset: the label is missing, unknown or out of range.
        """
        if self.task.problem == "regression":
            return self._number(label, source, place)
        if self.task.problem == "multi_label":
            return self._those_that_apply(label, source, place)
        return self._id(label, source, place)

    def _id(self, label: Any, source: str, place: Place) -> int:
        if isinstance(label, str) and NUMBER.fullmatch(label.strip()) and not self._names_are_numbers:
            label = float(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, str):
            return self._by_name(label, source, place)
        if not isinstance(label, int):
            raise InvalidDataset(source, f"the label is {type(label).__name__}, not an id or a name", place)
        count = self.task.outputs if self.names is None else len(self.names)
        if not 0 <= label < count:
            raise InvalidDataset(source, f"label {str(label)[:20]} is out of range: ids are 0 to {count - 1}", place)
        return int(label) if self.names is None else self._by_name(self.names[label], source, place)

    def _those_that_apply(self, label: Any, source: str, place: Place) -> tuple[float, ...]:
        if not isinstance(label, list | tuple):
            problem = f"the label is {type(label).__name__}, not a list of the labels that apply"
            raise InvalidDataset(source, problem, place)
        count = self.task.outputs if self.names is None else len(self.names)
        if all(isinstance(one, float | bool) for one in label) and label:
            if len(label) != count or not set(label) <= {0.0, 1.0}:
                raise InvalidDataset(source, f"the label is not {count} times 0.0 or 1.0", place)
            label = [index for index, applies in enumerate(label) if applies]
        ids = {self._id(one, source, place) for one in label}
        return tuple(float(index in ids) for index in range(self.task.outputs))

    @property
    def _names_are_numbers(self) -> bool:
        """Then text that spells a number can only be a name: `1` to `5` stars are not the ids 0 to 4."""
        return any(name.isdecimal() for name in self.task.label_ids)

    def check_names(self, source: str) -> None:
        """Raises InvalidDataset when a name of the data set is none of the checkpoint's."""
        if self.names and self.task.problem == "regression":
            raise InvalidDataset(source, "label_names are for classes; the checkpoint predicts a number")
        for name in self.names or ():
            self._by_name(name, source, None)

    @property
    def permutation(self) -> list[int] | None:
        """The checkpoint's id of each of the data set's ids, where they differ."""
        ids = [self.task.label_ids[name] for name in self.names or ()]
        return None if ids == list(range(len(ids))) else ids

    def _number(self, label: Any, source: str, place: Place) -> float:
        try:
            is_number = not isinstance(label, bool | str) or NUMBER.fullmatch(str(label).strip())
            value = float(label) if is_number and not isinstance(label, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise InvalidDataset(source, "the label of a regression is a finite number", place)
        return value

    def _by_name(self, name: str, source: str, place: Place | None) -> int:
        ids = self.task.label_ids
        if name not in ids:
            # Labels are a closed set that the data set's owner chose, so naming one gives no row's text away.
            raise InvalidDataset(source, f"label '{name[:64]}' is unknown{did_you_mean(name, list(ids))}", place)
        return ids[name]
