"""What a checkpoint predicts, and how a data set's labels are its labels."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from worker.engine.catalog.checkpoints.headers import CheckpointInfo
from worker.engine.catalog.contracts.spec import MetricName
from worker.engine.catalog.families import FAMILIES
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.primitives.notes import Doubt
from worker.engine.catalog.primitives.strict import MOST_NAMES, did_you_mean

Label = int | float | tuple[float, ...]
"""A class id, a number, or, of a multi-label head, 1 for each label that applies and 0 for each other."""
NUMBER = re.compile(r"[+-]?\d{1,300}(\.\d{0,300})?([eE][+-]?\d{1,3})?", re.ASCII)


BARE = re.compile(r"(?:label[ _-]?)?(\d{1,9})", re.ASCII | re.IGNORECASE)
"""A name that is only an id, as transformers gives to labels without names."""
DIGITS = re.compile(r"(?<!\d)\d{1,9}(?!\d)", re.ASCII)
TRUTH = {"false": False, "true": True}
LONGEST_NAME = 1000  # characters, of what is compared in other spellings
SHOWN_NAME = 64


@dataclass(frozen=True)
class Task:
    """A head's task. `outputs` is the width of the logits."""

    problem: Literal["classification", "multi_label", "regression"]
    outputs: int
    label_ids: dict[str, int]
    contradiction: str = ""
    """What config.json says of the names in two ways; then names do not count, and only ids are certain."""

    @cached_property
    def by_normal_name(self) -> dict[str, set[int]]:
        """The ids by a name's normal form, which several names may share."""
        found = defaultdict(set)
        for name, index in self.label_ids.items():
            found[normal(name)].add(index)
        return dict(found)

    @cached_property
    def has_no_names(self) -> bool:
        return are_bare(self.label_ids.items())

    @cached_property
    def numbers_are_names(self) -> bool:
        """Whether a label's name is another number than its id, as those of one to five stars."""
        return any(NUMBER.fullmatch(name) and float(name) != index for name, index in self.label_ids.items())

    @cached_property
    def number_beside_id(self) -> tuple[int, str] | None:
        """A number that labels of rows may be and that is in another name than that of the label with this id.

        As `1 star` is for the id 0: then the label 1 of a row may be `1 star` or `2 stars`.
        """
        for name, index in self.label_ids.items():
            numbers = DIGITS.findall(name[:LONGEST_NAME])
            if len(numbers) == 1 and index != int(numbers[0]) <= self.outputs:
                return int(numbers[0]), name
        return None

    def id_of(self, name: str) -> int | None:
        """The label of this name, or the only one that differs just in case, spaces, `_` and `-`."""
        if name in self.label_ids:
            return self.label_ids[name]
        ids = self.by_normal_name.get(normal(name), set())
        return next(iter(ids)) if len(ids) == 1 else None


def normal(name: str) -> str:
    """A name in lower case, with one space for any of spaces, `_` and `-` between letters or digits.

    What is too long for a label's name stays as it is: the standard form of accents takes the square of their number.
    """
    if len(name) > LONGEST_NAME:
        return name
    folded = unicodedata.normalize("NFKC", name).casefold().strip(" \t\r\n_")
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", folded)


def are_bare(names: Iterable[tuple[str, int]]) -> bool:
    """Whether every name is just its own id."""
    return all((found := BARE.fullmatch(name.strip())) and int(found[1]) == index for name, index in names)


def task_of(info: CheckpointInfo) -> Task:
    """The task of a sequence classification checkpoint, from its configuration.

    As in transformers: what `problem_type` says; without it, one output is regression.

    Raises:
        InvalidCheckpoint: regression with several outputs is not available.
    """
    config, family = info.config, FAMILIES[info.model_type]
    names = _labels(info, "id2label")
    outputs = len(names) if names else config.get("num_labels", 2)
    for module in family.head.modules:
        if f"{module}.weight" not in info.tensors:
            raise InvalidCheckpoint(info.source, f"no tensor {module}.weight, which {info.architecture} needs")
    logits = info.tensors[f"{family.head.logits}.weight"]
    if logits.shape[:1] != (outputs,):
        raise InvalidCheckpoint(
            info.source, f"config.json names {outputs} labels, {logits.name} has shape {list(logits.shape)}"
        )
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        return Task("multi_label", outputs, *_label_ids(info, outputs))
    if outputs == 1 or problem == "regression":
        if outputs != 1:
            raise InvalidCheckpoint(info.source, f"regression with {outputs} outputs is not available yet")
        return Task("regression", 1, {})
    return Task("classification", outputs, *_label_ids(info, outputs))


def _labels(info: CheckpointInfo, key: str) -> dict[str, Any]:
    labels = info.config.get(key) or {}
    if not isinstance(labels, dict):
        raise InvalidCheckpoint(info.source, f"config.json has {key} that is no object")
    return labels


def _label_ids(info: CheckpointInfo, outputs: int) -> tuple[dict[str, int], str]:
    """Name → id, from id2label and label2id, else the names that transformers gives; and in what the two differ.

    A table that was left as transformers makes it, `LABEL_0` and so on, says nothing beside one with names.
    """
    of_ids = [(str(name), index) for index, name in _labels(info, "id2label").items()]
    of_names = list(_labels(info, "label2id").items())
    named = [(key, table) for key, table in (("id2label", of_ids), ("label2id", of_names)) if table]
    tables = {key: _with_ids(info, key, table, outputs) for key, table in named}
    with_names = {key: table for key, table in tables.items() if not are_bare(table)}
    used = list((with_names or tables).values())
    if not used:
        return {f"LABEL_{index}": index for index in range(outputs)}, ""
    contradiction = _differently_named(*used) if len(used) == 2 else _named_twice(used[0])
    return {name: index for table in used for name, index in table}, contradiction


def _with_ids(info: CheckpointInfo, key: str, table: list[tuple[str, Any]], outputs: int) -> list[tuple[str, int]]:
    found = []
    for name, index in table:
        number = str(index)
        if not (number.isdecimal() and len(number) < 10 and int(number) < outputs):
            problem = f"config.json has {key} '{name[:SHOWN_NAME]}' = {number[:20]}; ids are 0 to {outputs - 1}"
            raise InvalidCheckpoint(info.source, problem)
        found.append((name, int(number)))
    return found


def _named_twice(table: list[tuple[str, int]]) -> str:
    ids: dict[str, int] = {}
    for name, index in table:
        if ids.setdefault(name, index) != index:
            return f"'{name[:SHOWN_NAME]}' is both the label {ids[name]} and the label {index}"
    return ""


def _differently_named(of_ids: list[tuple[str, int]], of_names: list[tuple[str, int]]) -> str:
    """Where label2id contradicts id2label; it may have further names of the same ids."""
    named_by_id: dict[str, set[int]] = defaultdict(set)
    for name, index in of_ids:
        named_by_id[normal(name)].add(index)
    known = {(normal(name), index) for name, index in of_names}
    first_name = {index: name for name, index in reversed(of_ids)}
    for name, index in of_names:
        others = named_by_id.get(normal(name))
        if others and index not in others:
            return f"'{name[:SHOWN_NAME]}' is the label {min(others)} in id2label, and {index} in label2id"
        other = first_name.get(index)
        if not others and other is not None and (normal(other), index) not in known:
            return f"the label {index} is '{other[:SHOWN_NAME]}' in id2label, and '{name[:SHOWN_NAME]}' in label2id"
    return _named_twice(of_ids)


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
    name, is looked up by name among the checkpoint's. Of a multi-label head a row has a list of ids or names, of those
    that apply, or else 0 or 1 (or false or true) for every label.
    """

    task: Task
    names: tuple[str, ...] | None = None

    def value(self, label: Any, source: str, place: Place) -> Label:
        """The head's value of a row's `label`. Text that is no name counts as the number that it spells, as in CSV.

        Raises:
            InvalidDataset: the label is missing, unknown, out of range, or may mean two things.
        """
        if self.task.problem == "regression":
            return self._number(label, source, place)
        if self.task.problem == "multi_label":
            return self._those_that_apply(label, source, place)
        return self._id(label, source, place)

    def _id(self, label: Any, source: str, place: Place) -> int:
        label = self._spelt(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool):
            if self.task.id_of(str(label)) is not None:
                return self._by_name(str(label), source, place)
            if self._count != len(TRUTH):
                problem = f"the label is {str(label).lower()}, and the head has {self._count} labels, not two"
                raise InvalidDataset(source, problem, place)
        if isinstance(label, str):
            return self._by_name(label, source, place)
        if label is None:
            raise InvalidDataset(source, "the row has no label", place)
        if not isinstance(label, int):
            raise InvalidDataset(source, f"the label is {type(label).__name__}, not an id or a name", place)
        if self.names is None and self.task.numbers_are_names:
            problem = f"label {str(label)[:20]} may be an id or a name; names that are numbers are written as text"
            raise InvalidDataset(source, f"{problem}, ids need label_names", place)
        if self.names is None and self.task.number_beside_id is not None:
            number, name = self.task.number_beside_id
            index = self.task.label_ids[name]
            problem = f"label {str(label)[:20]} may be an id or the number in a name: the checkpoint calls the label "
            problem += f"{index} '{name[:SHOWN_NAME]}', which may also be meant by {number}"
            advice = "write names in the rows, or say with label_names which labels the ids 0, 1, … are"
            raise InvalidDataset(source, f"{problem}; {advice}", place)
        if not 0 <= label < self._count:
            problem = f"label {str(label)[:20]} is out of range: ids are 0 to {self._count - 1}"
            unlabelled = "; -1 is what test splits have in place of labels" if label == -1 else ""
            raise InvalidDataset(source, problem + unlabelled, place)
        return int(label) if self.names is None else self._by_name(self.names[label], source, place)

    def _those_that_apply(self, label: Any, source: str, place: Place) -> tuple[float, ...]:
        if not isinstance(label, list | tuple):
            problem = f"the label is {type(label).__name__}, not a list of the labels that apply"
            hint = "; CSV has none, JSON lines and Parquet do" if isinstance(label, str) else ""
            raise InvalidDataset(source, problem + hint, place)
        entries = [self._spelt(one) for one in label]
        if self._has_one_for_each(entries, source, place):
            entries = [index for index, applies in enumerate(entries) if applies]
            # As ids, whatever they are called: those of a head whose labels are numbers are no names here.
            ids = entries if self.names is None else [self._id(one, source, place) for one in entries]
        else:
            ids = [self._id(one, source, place) for one in entries]
        if len(set(ids)) < len(ids):
            raise InvalidDataset(source, "the label is a list that has one label twice", place)
        return tuple(float(index in ids) for index in range(self.task.outputs))

    def _has_one_for_each(self, entries: Sequence[Any], source: str, place: Place) -> bool:
        """Whether the entries say of each label if it applies, instead of naming those that do.

        As many zeros and ones as there are labels, one of them repeated, cannot be ids.
        """
        if not entries or not all(isinstance(one, int | float) for one in entries):
            return False
        is_complete = len(entries) == self._count and set(entries) <= {0, 1}
        if all(isinstance(one, float | bool) for one in entries):
            if not is_complete:
                raise InvalidDataset(source, f"the label is not {self._count} times 0.0 or 1.0", place)
            return True
        if is_complete and all(0 <= one < self._count for one in entries) and len(set(entries)) == len(entries):
            shown = ", ".join(str(one) for one in entries)
            problem = f"the label [{shown}] may be ids or a value for each label; write values as 0.0 and 1.0"
            raise InvalidDataset(source, problem, place)
        return is_complete

    @property
    def _count(self) -> int:
        """The number of the data set's ids."""
        return self.task.outputs if self.names is None else len(self.names)

    def _spelt(self, label: Any) -> Any:
        """The number or truth value that text spells which is no name; anything else as it is."""
        if not isinstance(label, str) or self.task.id_of(label) is not None:
            return label
        text = label.strip()
        if NUMBER.fullmatch(text) and not self.task.numbers_are_names:
            return int(text) if text.lstrip("+-").isdecimal() else float(text)
        return TRUTH.get(text.lower(), label) if self._count == len(TRUTH) else label

    def check_names(self, source: str) -> None:
        """Raises InvalidDataset when a name of the data set is none of the checkpoint's, or two are the same one."""
        if self.names and self.task.problem == "regression":
            raise InvalidDataset(source, "label_names are for classes; the checkpoint predicts a number")
        found: dict[int, str] = {}
        for name in self.names or ():
            index = self._by_name(name, source, None)
            if index in found:
                both = f"'{found[index][:SHOWN_NAME]}' and '{name[:SHOWN_NAME]}'"
                raise InvalidDataset(source, f"its labels {both} are the same label of the checkpoint, {index}")
            found[index] = name

    @property
    def permutation(self) -> list[int | None] | None:
        """The checkpoint's id of each of the data set's ids, where they differ; None in it for one that it lacks."""
        ids = [self.task.id_of(name) for name in self.names or ()]
        return None if all(own in (index, None) for index, own in enumerate(ids)) else ids

    def begins_at_one(self, labels: Iterable[Any]) -> bool:
        """Whether these, if they are ids of classes taken as they are, are all but the first: perhaps one too high."""
        if self.names is not None or self.task.problem != "classification":
            return False
        ids = {self._spelt(label) for label in labels}
        return not any(isinstance(one, str | bool) for one in ids) and ids == set(range(1, self.task.outputs))

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
        if self.task.contradiction:
            problem = f"its label '{name[:SHOWN_NAME]}' cannot be looked up: {self.task.contradiction}"
            raise InvalidDataset(source, f"{problem}; correct the checkpoint's config.json", place)
        index = self.task.id_of(name)
        if index is None:
            # Labels are a closed set that the data set's owner chose, so naming one gives no row's text away.
            alike = sorted(other for other in self.task.label_ids if normal(other) == normal(name))
            of_names = "" if place else " of label_names"
            said = f"label '{name[:SHOWN_NAME]}'{of_names}"
            if alike:
                either = " or ".join(f"'{other[:SHOWN_NAME]}'" for other in alike)
                raise InvalidDataset(source, f"{said} is unknown; did you mean {either}?", place)
            missing = "; the row has no label" if not name.strip() else did_you_mean(name, list(self.task.label_ids))
            advice = "; label_names can say which of these it is" if self.names and place else ""
            raise InvalidDataset(source, f"{said} is unknown{missing}{advice}", place)
        return index


def label_map(
    task: Task, source: str, asked: Sequence[str] | None, own: Sequence[str] | None = None, checkpoint: str = ""
) -> tuple[LabelMap, list[str]]:
    """The map from a data set's labels to the head's, with notes for the reader.

    Args:
        asked: what the request says that the data set calls its ids.
        own: what the data set itself says.
        checkpoint: what notes call the head's.

    Raises:
        InvalidDataset: names are given, and it is not certain which labels of the checkpoint they are.
    """
    own = None if own is None or are_bare((name, index) for index, name in enumerate(own)) else own
    if asked:
        labels = LabelMap(task, tuple(asked))
        labels.check_names(source)
        return labels, [*_otherwise_named(labels, source, own or ()), *_reordered(labels, checkpoint, source)]
    labels = LabelMap(task)
    if own is None:
        return labels, []
    shown = ", ".join(name[:SHOWN_NAME] for name in own[:MOST_NAMES])
    if task.problem == "regression":
        return labels, [
            Doubt(f"the labels of {source} are classes ({shown}); their ids were taken as numbers, for {checkpoint}")
        ]
    if not task.contradiction and all(task.id_of(name) is None for name in own):
        if task.has_no_names:
            return labels, [
                Doubt(
                    f"{source} calls its labels {shown}; {checkpoint} has no names for its own, so it is not certain "
                    "that they are in the same order: ids were taken as they are; label_names can say their order"
                )
            ]
        theirs = ", ".join(sorted(task.label_ids, key=lambda name: task.label_ids[name])[:MOST_NAMES])
        problem = f"it calls its labels {shown}, and none of them is one of {checkpoint}'s, {theirs}"
        raise InvalidDataset(source, f"{problem}; say with label_names which of these its ids 0, 1, … are")
    labels = LabelMap(task, tuple(own))
    LabelMap(task, tuple(name for name in own if task.contradiction or task.id_of(name) is not None)).check_names(
        source
    )
    return labels, _reordered(labels, checkpoint, source)


def _otherwise_named(labels: LabelMap, source: str, own: Sequence[str]) -> list[str]:
    """A doubt if the request's names and the data set's are different labels of the checkpoint."""
    for index, (name, other) in enumerate(zip(labels.names or (), own, strict=False)):
        if labels.task.id_of(other) not in (None, labels.task.id_of(name)):
            said = f"'{name[:SHOWN_NAME]}', and the data set itself '{other[:SHOWN_NAME]}'"
            return [Doubt(f"label_names calls the label {index} of {source} {said}; label_names was followed")]
    return []


def _reordered(labels: LabelMap, checkpoint: str, source: str) -> list[str]:
    ids = labels.permutation
    if ids is None:
        return []
    order = ", ".join("none" if index is None else str(index) for index in ids)
    return [
        f"the labels of {source} are in another order than those of {checkpoint}: its ids 0 to {len(ids) - 1} are the "
        f"checkpoint's {order}"
    ]
