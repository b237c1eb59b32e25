"""The answer to a question is a span of a context, or there is none."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.data.rows import Cells, Row, RowReader
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.tasks.task import LabelMap, Task


class QuestionReader(RowReader):
    """Reads rows of a question and the context that the answer is in."""

    def row(self, cells: Cells) -> Row:
        return Row(cells.place, cells.text("question"), cells.text("context"), cells.values.get("answers"))


class QuestionAnswering(Task):
    """The label of a row is its answers, as SQuAD has them: `{"text": […], "answer_start": […]}`, or lists of such."""

    name = "question_answering"
    ending = "ForQuestionAnswering"
    metrics = ("f1", "exact_match")
    estimators = frozenset({"auto", "sampled", "empirical"})
    has_classes: ClassVar[bool] = False
    reads_windows: ClassVar[bool] = True
    rows = QuestionReader(required=("question", "context"), optional=(), label="answers", label_is_object=True)

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        if outputs != 2:
            raise InvalidCheckpoint(info.source, f"a head that answers questions has 2 outputs, and this one {outputs}")
        return cls(outputs, {})

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> tuple[tuple[str, int], ...]:
        """Return each answer's text and the place of its first character in the context; none if there is no answer."""
        if isinstance(label, Mapping):
            texts, starts = label.get("text"), label.get("answer_start")
            if not isinstance(texts, list | tuple) or not isinstance(starts, list | tuple) or len(texts) != len(starts):
                problem = "the answers are no lists `text` and `answer_start` of the same length"
                raise InvalidDataset(source, problem, place)
            found = [*zip(texts, starts, strict=True)]
        elif isinstance(label, list | tuple) and all(isinstance(one, Mapping) for one in label):
            found = [(one.get("text"), one.get("answer_start")) for one in label]
        else:
            problem = f"the answers are {type(label).__name__}, not an object with lists `text` and `answer_start`"
            raise InvalidDataset(source, problem, place)
        for text, start in found:
            if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool) or start < 0:
                raise InvalidDataset(source, "an answer is no text with the number of its first character", place)
            if not text:
                problem = "an answer is empty; of a question without an answer, both lists are empty"
                raise InvalidDataset(source, problem, place)
        return tuple(found)
