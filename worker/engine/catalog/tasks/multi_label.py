"""A sequence has any number of several labels, which apply independently of each other."""

from collections.abc import Sequence
from typing import Any, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.primitives.errors import InvalidDataset, Place
from worker.engine.catalog.tasks.names import label_ids
from worker.engine.catalog.tasks.task import LabelMap, Task


class MultiLabel(Task):
    """A row has a list of the ids or names that apply, or else 0 or 1 (or false or true) for every label."""

    name = "multi_label"
    ending = "ForSequenceClassification"
    metrics = ("f1", "accuracy")
    answers_rows = True

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self | None:
        if info.config.get("problem_type") != "multi_label_classification":
            return None
        return cls(outputs, *label_ids(info, outputs))

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> tuple[float, ...]:
        if not isinstance(label, list | tuple):
            problem = f"the label is {type(label).__name__}, not a list of the labels that apply"
            hint = "; CSV has none, JSON lines and Parquet do" if isinstance(label, str) else ""
            raise InvalidDataset(source, problem + hint, place)
        entries = [labels.spelt(one) for one in label]
        if self._has_one_for_each(entries, labels, source, place):
            entries = [index for index, applies in enumerate(entries) if applies]
            # Numbers count as ids, even if the head's labels have numbers for names.
            ids = entries if labels.names is None else [labels.id(one, source, place) for one in entries]
        else:
            ids = [labels.id(one, source, place) for one in entries]
        if len(set(ids)) < len(ids):
            raise InvalidDataset(source, "the label is a list that has one label twice", place)
        return tuple(float(index in ids) for index in range(self.outputs))

    def _has_one_for_each(self, entries: Sequence[Any], labels: LabelMap, source: str, place: Place) -> bool:
        """Return whether the entries say of each label whether it applies, instead of naming those that do.

        If there are as many zeros and ones as labels, and one of them is repeated, they cannot be ids.
        """
        if not entries or not all(isinstance(one, int | float) for one in entries):
            return False
        is_complete = len(entries) == labels.count and set(entries) <= {0, 1}
        if all(isinstance(one, float | bool) for one in entries):
            if not is_complete:
                raise InvalidDataset(source, f"the label is not {labels.count} times 0.0 or 1.0", place)
            return True
        if is_complete and all(0 <= one < labels.count for one in entries) and len(set(entries)) == len(entries):
            shown = ", ".join(str(one) for one in entries)
            problem = f"the label [{shown}] may be ids or a value for each label; write values as 0.0 and 1.0"
            raise InvalidDataset(source, problem, place)
        return is_complete
