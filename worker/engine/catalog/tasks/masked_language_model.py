"""Tokens of a text that are hidden are predicted from all others."""

from collections.abc import Mapping
from typing import ClassVar, Self

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import completed
from worker.engine.catalog.data.rows import RowReader
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.tasks.causal_language_model import CausalLanguageModel


class MaskedLanguageModel(CausalLanguageModel):
    """The labels of a row are those of its own tokens that are hidden."""

    name = "masked_language_model"
    ending = "ForMaskedLM"
    metrics = ("perplexity", "loss", "token_accuracy")
    rows = RowReader(optional=(), label=None)
    of_metrics: ClassVar[Mapping[str, RowReader]] = {}
    writing_metrics = frozenset()
    is_causal: ClassVar[bool] = False
    answers_rows: ClassVar[bool] = False

    @classmethod
    def of(cls, info: CheckpointInfo, outputs: int) -> Self:
        if completed(info.config).get("legacy") is False:
            raise InvalidCheckpoint(info.source, "a head of masked words with legacy: false is not available yet")
        return super().of(info, outputs)
