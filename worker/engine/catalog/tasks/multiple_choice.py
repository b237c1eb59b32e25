"""One of several texts follows on another."""

from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.rows import Cells, ChoiceReader, Row
from worker.engine.catalog.families import Head
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.tasks.task import LabelMap, Task


class BegunChoiceReader(ChoiceReader):
    """Reads rows of choices, which may all begin with the text of `text_pair`, as in SWAG."""

    def row(self, cells: Cells) -> Row:
        row, beginning = super().row(cells), cells.optional_text("text_pair")
        if beginning is None:
            return row
        choices = tuple(f"{beginning} {choice}" for choice in row.choices or ())
        return Row(row.place, row.text, None, row.label, choices=choices)


class MultipleChoice(Task):
    """The label of a row is the place of the right choice, from 0, or its text."""

    name = "multiple_choice"
    ending = "ForMultipleChoice"
    metrics = ("accuracy",)
    reads_choices = True
    has_classes: ClassVar[bool] = False
    rows = BegunChoiceReader(required=("text", "choices"), optional=("text_pair",), lists=frozenset({"choices"}))

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        return cls(outputs, {})

    @classmethod
    def outputs_in(cls, info: CheckpointInfo, head: Head) -> int:
        """Return 1, the number of outputs for each choice. Raises InvalidCheckpoint where a module is missing."""
        for module in head.modules:
            if f"{module}.weight" not in info.tensors:
                raise InvalidCheckpoint(info.source, f"no tensor {module}.weight, which {info.architecture} needs")
        return 1

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> int:
        if not isinstance(label, int):
            raise InvalidDataset(source, "the row has no label", place)
        return label
