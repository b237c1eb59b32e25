"""The next token of a text is predicted from those before it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import Architecture, completed
from worker.engine.catalog.data.rows import ROWS_OF_CHOICES, ConversationReader, RowReader
from worker.engine.catalog.families import Family, Head
from worker.engine.catalog.primitives.errors import InvalidCheckpoint, InvalidDataset, Place
from worker.engine.catalog.tasks.task import LabelMap, Task

MESSAGES = frozenset({"messages"})


class CausalLanguageModel(Task):
    """The labels of a row are its own tokens: all but the first, or, of a prompt with a completion, the latter's."""

    name = "causal_language_model"
    ending: ClassVar[str | tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    metrics: ClassVar[tuple[str, ...]] = (
        "perplexity",
        "loss",
        "token_accuracy",
        "choice_accuracy",
        "choice_accuracy_normalised",
        "exact_match",
    )
    minimised = frozenset({"perplexity", "loss"})
    rows: ClassVar[RowReader] = ConversationReader(optional=("target", "messages"), label=None, lists=MESSAGES)
    of_metrics: ClassVar[Mapping[str, RowReader]] = {
        "choice_accuracy": ROWS_OF_CHOICES,
        "choice_accuracy_normalised": ROWS_OF_CHOICES,
        "exact_match": ConversationReader(("text", "target"), optional=("messages",), label=None, lists=MESSAGES),
    }
    writing_metrics = frozenset({"exact_match"})
    estimators = frozenset({"auto", "sampled", "empirical"})
    merges_heads = True
    has_classes: ClassVar[bool] = False
    answers_rows: ClassVar[bool] = True
    is_causal: ClassVar[bool] = True
    """Whether tokens do not see those after them, which has to be so on the backbone."""

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        return cls(outputs, {})

    @classmethod
    def head_on(cls, family: Family, found: Architecture) -> Head | None:
        """Return the head, which is only on backbones whose tokens see the others as the task says."""
        return super().head_on(family, found) if family.is_causal is cls.is_causal else None

    @classmethod
    def outputs_in(cls, info: CheckpointInfo, head: Head) -> int:
        """Return the size of the vocabulary. Raises InvalidCheckpoint where the configuration does not say it."""
        size = completed(info.config).get("vocab_size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            raise InvalidCheckpoint(info.source, "config.json has no usable vocab_size")
        return size

    def value(self, label: Any, labels: LabelMap, source: str, place: Place) -> int:
        raise InvalidDataset(source, "a language model's labels are the row's own tokens", place)
