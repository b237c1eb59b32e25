"""The interface of a head's task, and the map from a data set's labels to the head's."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import Architecture
from worker.engine.catalog.data.rows import RowReader
from worker.engine.catalog.families import Family, Head, Kind
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.primitives.strict import did_you_mean
from worker.engine.catalog.tasks.names import DIGITS, LONGEST_NAME, NUMBER, SHOWN_NAME, are_bare, labels_in, normal

Label = int | float | tuple[Any, ...]
"""A label as the head's task has it: a class id, a number, several numbers, or answers with their places."""
TRUTH = {"false": False, "true": True}
TRUTH_NAMES = {False: ("false", "no"), True: ("true", "yes")}
"""Names that labels have for truth values."""


LOGITS = "classifier"
"""Name of the module that gives the logits, if their number is not that of labels and a head has several modules."""


@dataclass(frozen=True)
class Task(ABC):
    """A head's task. Each kind of head is a subclass, in a file of its own."""

    name: ClassVar[str]
    """Name of the task in plans and messages."""
    ending: ClassVar[str | tuple[str, ...]]
    """End of the names of the classes with such a head, or several ends."""
    rows: ClassVar[RowReader] = RowReader(optional=("text_pair",))
    """Reader of the columns that such a head reads."""
    of_metrics: ClassVar[Mapping[str, RowReader]] = {}
    """Readers of the rows on which a metric is computed, by its name, where they are not `rows`."""
    writing_metrics: ClassVar[frozenset[str]] = frozenset()
    """Names of the metrics that judge what a model writes, for which an evaluation has further settings."""
    labels_need: ClassVar[tuple[str, ...]] = ()
    """Columns that a row may lack, and without which it has no label."""
    estimators: ClassVar[frozenset[str]] = frozenset({"auto", "expected", "sampled", "empirical"})
    """Names of the estimators that can be computed."""
    reads_images: ClassVar[bool] = False
    """Whether rows are images, which the checkpoint's image processor makes inputs of, not texts and its tokenizer."""
    reads_windows: ClassVar[bool] = False
    """Whether a row that is longer than the limit is read in windows that overlap."""
    reads_choices: ClassVar[bool] = False
    """Whether the model takes several sequences a row: (rows, choices, tokens) instead of (rows, tokens)."""
    merges_heads: ClassVar[bool] = False
    """Whether such heads were pre-trained, and merge with their backbone, see `Head.merges`."""
    metrics: ClassVar[tuple[str, ...]]
    """Names of the metrics by which such a head is evaluated; the first is the default."""
    minimised: ClassVar[frozenset[str]] = frozenset()
    """Names of the metrics of which less is better."""
    hub_metrics: ClassVar[Mapping[str, str]] = {}
    """The hub's names of metrics, where they are others."""
    has_classes: ClassVar[bool] = True
    """Whether labels are ids of classes, which may have names."""
    answers_rows: ClassVar[bool] = False
    """Whether a model's answers to single rows can be told, see `HeadKind.answered`."""

    outputs: int
    """Width of the logits."""
    label_ids: dict[str, int]
    """Ids of the labels by name."""
    contradiction: str = ""
    """Contradiction about names in config.json; if there is one, names do not count, and only ids are certain."""

    @classmethod
    def reader(cls, metric: str | None) -> RowReader:
        """Return the reader of rows on which a metric is computed; None: of rows to measure or to align on."""
        return cls.of_metrics.get(metric or "", cls.rows)

    @classmethod
    def is_of(cls, info: CheckpointInfo) -> bool:
        """Return whether a checkpoint may have such a head."""
        return info.architecture.endswith(cls.ending)

    @classmethod
    @abstractmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self | None:
        """Make the task of a checkpoint whose class has the ending; None if its configuration has another task.

        Raises:
            InvalidCheckpoint: a setting of it is not available.
        """

    @property
    def title(self) -> str:
        """Words for a model with such a head."""
        return self.name.replace("_", " ")

    @classmethod
    def head_on(cls, family: Family, found: Architecture) -> Head | None:
        """Return the head of a class that the family's own table does not have; None where it has no table.

        Its modules are those outside the backbone. Where the class has no pooler, that of a checkpoint is left out. A
        class whose backbone lacks the prefix, or the decoder, has none.
        """
        prefix = found.body
        if not prefix or (family.decoder is not None and not _has_decoder(family, found)):
            return None
        names = {name.rpartition(".")[0] for name in found.all_names if not name.startswith(prefix)}
        # A pooler that the family does not have was not pre-trained, and belongs to the head.
        own = {name.rpartition(".")[0] for name in found.all_names if name.startswith(f"{prefix}pooler.")}
        names |= {name for name in own if name.removeprefix(prefix) not in family.outer_modules}
        # The last one gives the logits.
        modules = sorted(names, key=lambda name: (_counts_labels(found, name), name == LOGITS, name))
        poolers = (module for module, kind in family.outer_modules.items() if kind is Kind.POOLER)
        parts = (f"{module}.{part}" for module in poolers for part in ("weight", "bias"))
        unread = tuple(part for part in parts if prefix + part not in found.all_names)
        if not names:
            return None
        stored = {module: found.stored[module][0] for module in modules if module in found.stored}
        return Head(found.name, tuple(modules), merges=cls.merges_heads, unread=unread, stored=stored)

    @classmethod
    def beside(cls, family: Family, head: Head, found: Architecture) -> Family:
        """Return the backbone beside a head of the class `found`."""
        return family.under(head, found.body)

    @classmethod
    def outputs_in(cls, info: CheckpointInfo, head: Head) -> int:
        """Return the number of a head's outputs. Raises InvalidCheckpoint, see `outputs_of`."""
        return outputs_of(info, head)

    @abstractmethod
    def value(self, label: Any, labels: "LabelMap", source: str, place: Place) -> Label:
        """Return the head's value of a row's `label`. Raises InvalidDataset, see `LabelMap.value`."""

    def begins_at_one(self, labels: Sequence[Any]) -> bool:
        """Return whether these labels of rows, if they are ids that were taken as they are, may be one too high."""
        return False

    def metric_problem(self, metric: str) -> str | None:
        """Return why one of the metrics cannot be computed for this head; None if it can."""
        return None

    @property
    def f1_is_of_one(self) -> bool:
        """Whether F1 is that of label 1 alone."""
        return False

    @cached_property
    def names(self) -> list[str]:
        """The labels' names by id; transformers' own, such as `LABEL_0`, where there is none that is certain."""
        found = {} if self.contradiction else {index: name for name, index in reversed(self.label_ids.items())}
        own = [f"LABEL_{index}" for index in range(self.outputs)]
        names = [found.get(index, name) for index, name in enumerate(own)]
        return names if len(set(names)) == len(names) else own

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
        """Whether a label's name is another number than its id, such as the names of one to five stars."""
        return any(NUMBER.fullmatch(name) and float(name) != index for name, index in self.label_ids.items())

    @cached_property
    def number_beside_id(self) -> tuple[int, str] | None:
        """A number that is a label's id and is in another label's name, with that name; None if there is none.

        For example, id 0 has the name `1 star`: then the label 1 of a row may mean `1 star` or `2 stars`. Of two labels
        the names `true` and `yes` count as 1, and `false` and `no` as 0.
        """
        for name, index in self.label_ids.items():
            numbers = [int(digits) for digits in DIGITS.findall(name[:LONGEST_NAME])]
            if self.outputs == len(TRUTH):
                numbers += [int(value) for value, names in TRUTH_NAMES.items() if normal(name) in names]
            if len(numbers) == 1 and index != numbers[0] <= self.outputs:
                return numbers[0], name
        return None

    def truth_name(self, value: bool) -> str | None:
        """Return the name of the label that is named by a truth value; None if no label is."""
        return next((name for name in TRUTH_NAMES[value] if self.id_of(name) is not None), None)

    def id_of(self, name: str) -> int | None:
        """Return the label of this name, or the only one that differs only in case, spaces, `_` and `-`."""
        if name in self.label_ids:
            return self.label_ids[name]
        ids = self.by_normal_name.get(normal(name), set())
        return next(iter(ids)) if len(ids) == 1 else None


@dataclass(frozen=True)
class LabelMap:
    """Maps a row's label to the head's.

    Integers are the checkpoint's own ids, unless `names` has the data set's names of them: then a label, number or
    name, is looked up by name among the checkpoint's.
    """

    task: Task
    names: tuple[str, ...] | None = None

    def value(self, label: Any, source: str, place: Place) -> Label:
        """Return the head's value of a row's `label`. Text that is no name counts as the number that it spells.

        Raises:
            InvalidDataset: the label is missing, unknown, out of range, or may mean two things.
        """
        return self.task.value(label, self, source, place)

    def id(self, label: Any, source: str, place: Place) -> int:
        """Return the head's id of one label. Raises InvalidDataset, see `value`."""
        label = self.spelt(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool):
            name = self.task.truth_name(label)
            if name is not None:
                return self._by_name(name, source, place)
            if self.count != len(TRUTH):
                problem = f"the label is {str(label).lower()}, and the head has {self.count} labels, not two"
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
        if not 0 <= label < self.count:
            problem = f"label {str(label)[:20]} is out of range: ids are 0 to {self.count - 1}"
            unlabelled = "; -1 is what test splits have in place of labels" if label == -1 else ""
            raise InvalidDataset(source, problem + unlabelled, place)
        return int(label) if self.names is None else self._by_name(self.names[label], source, place)

    @property
    def count(self) -> int:
        """Number of the data set's ids."""
        return self.task.outputs if self.names is None else len(self.names)

    def spelt(self, label: Any) -> Any:
        """Return the number or truth value that a text spells if it is no name; anything else is unchanged."""
        if not isinstance(label, str) or self.task.id_of(label) is not None:
            return label
        text = label.strip()
        if NUMBER.fullmatch(text) and not self.task.numbers_are_names:
            return int(text) if text.lstrip("+-").isdecimal() else float(text)
        return TRUTH.get(text.lower(), label) if self.count == len(TRUTH) else label

    def check_names(self, source: str) -> None:
        """Raise InvalidDataset when a name of the data set is none of the checkpoint's, or two are the same one."""
        if self.names and not self.task.has_classes:
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
        """The checkpoint's id of each of the data set's ids, where they differ; None for an id that it lacks."""
        ids = [self.task.id_of(name) for name in self.names or ()]
        return None if all(own in (index, None) for index, own in enumerate(ids)) else ids

    def reads_truth_as_ids(self, labels: Iterable[Any]) -> bool:
        """Return whether there are truth values among these labels, and the head's names are of other things."""
        is_plain = self.task.has_no_names or bool(self.task.contradiction) or not self.task.has_classes
        is_named = self.names is not None or any(self.task.truth_name(value) for value in TRUTH_NAMES)
        return not is_plain and not is_named and any(isinstance(self.spelt(label), bool) for label in labels)

    def begins_at_one(self, labels: Iterable[Any]) -> bool:
        """Return whether these labels, taken as ids, are all ids but the first, so that they may be one too high."""
        return self.names is None and self.task.begins_at_one([self.spelt(label) for label in labels])

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


def _has_decoder(family: Family, found: Architecture) -> bool:
    """Return whether a class has the family's decoder, and not its encoder alone."""
    return family.decoder is not None and any(
        name.startswith(found.body + family.decoder.layers.partition("{")[0]) for name in found.all_names
    )


def _counts_labels(found: Architecture, module: str) -> bool:
    """Return whether a module has as many outputs as there are labels, or a number that the class sets."""
    outputs = {**found.tensors, **found.optional}.get(f"{module}.weight", ())[:1]
    return outputs == ["num_labels"] or any(isinstance(length, int) for length in outputs)


def outputs_of(info: CheckpointInfo, head: Head) -> int:
    """Return the number of a head's outputs, on which configuration and tensors agree.

    Raises:
        InvalidCheckpoint: they do not agree, or a module of the head is missing.
    """
    names = labels_in(info, "id2label")
    outputs: int = len(names) if names else info.config.get("num_labels", 2)
    for module in head.modules:
        if f"{module}.weight" not in info.tensors:
            raise InvalidCheckpoint(info.source, f"no tensor {module}.weight, which {info.architecture} needs")
    logits = info.tensors[f"{head.logits}.weight"]
    if logits.shape[:1] != (outputs,):
        raise InvalidCheckpoint(
            info.source, f"config.json names {outputs} labels, {logits.name} has shape {list(logits.shape)}"
        )
    return outputs
