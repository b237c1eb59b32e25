"""Answers of models to single rows, for people who try a merge."""

from typing import Any, Literal

from pydantic import Field

from worker.engine.catalog.contracts.spec import CheckpointSpec, JobSpec, OutputSpec
from worker.engine.catalog.primitives.slices import OutputSlice
from worker.engine.catalog.primitives.strict import Strict

MOST_LABELS = 20
"""Number of labels of which probabilities are told, the likeliest ones."""
NEW_TOKENS = 32
"""Largest number of tokens that a language model writes, unless another one is asked for."""
MOST_NEW_TOKENS = 256


class LabelAnswer(Strict):
    """The answer of a model that gives a row, or a word, one label."""

    label: str
    """Name of the likeliest label, or transformers' own, such as `LABEL_0`, where it has none."""
    probabilities: dict[str, float]
    """Probabilities of labels, from the likeliest on; at most 20."""


class LabelsAnswer(Strict):
    """The answer of a model whose labels apply independently of each other."""

    labels: list[str]
    """Names of the labels that are more likely than not to apply."""
    probabilities: dict[str, float]
    """Probability of each label to apply, from the likeliest on; at most 20."""


class ValueAnswer(Strict):
    """The answer of a model that gives a row a number."""

    value: float
    """The number."""


class WordsAnswer(Strict):
    """The answer of a model that gives each word of a row a label."""

    words: list[LabelAnswer]
    """Answers for the row's words, in their order."""


class TextAnswer(Strict):
    """The answer of a model that writes."""

    text: str
    """Text that follows on the row's; each token is the likeliest one."""
    tokens: int
    """Number of its tokens, without an end token."""


Answer = LabelAnswer | LabelsAnswer | ValueAnswer | WordsAnswer | TextAnswer


class RowPrediction(Strict):
    """What the models answer to one row."""

    expert: Answer
    """Answer of the model itself."""
    average: Answer
    """Answer of the unweighted average of the models that take part in the merge, with the expert's own head unless
    that is a language model's."""
    merged: Answer
    """Answer of the merge, as it is in the artifact."""


class Prediction(Strict):
    """The answers of a merge, of one of its experts and of the plain average, side by side."""

    task: str
    """Task of the model's head, which decides the form of the answers."""
    rows: list[RowPrediction]
    """Answers to the rows, in their order."""


class PredictionSpec(JobSpec):
    """Rows that a merge which was published, one of its experts and the plain average answer. Nothing is kept of them.

    The merge is described as its job was, without rows to measure, to align on or to evaluate on.
    """

    kind: Literal["prediction"] = "prediction"
    base: CheckpointSpec | None = None
    output: OutputSpec
    slices: list[OutputSlice] | None = None
    model: str
    """Name of the expert."""
    merged: CheckpointSpec
    """The expert's model in the artifact."""
    rows: list[str | dict[str, Any]] = Field(repr=False)
    """Rows as texts, or by the settings that name columns, such as `text`."""
    new_tokens: int = NEW_TOKENS
    """Largest number of tokens that a language model writes."""

    @property
    def loads_models(self) -> bool:
        return True

    @property
    def models_beside(self) -> int:
        """Two: the merge and the plain average."""
        return 2

    @property
    def checkpoints(self) -> list[CheckpointSpec]:
        return [*super().checkpoints, *([self.base] if self.base else ())]
