"""A text is written after another was read: an encoder reads it, and a decoder writes token by token."""

from collections.abc import Mapping
from typing import ClassVar

from worker.engine.catalog.checkpoints.library import Architecture
from worker.engine.catalog.data.rows import ROWS_OF_CHOICES, RowReader
from worker.engine.catalog.families import Family, Head
from worker.engine.catalog.tasks.causal_language_model import CausalLanguageModel

OUTPUT_LAYER = "lm_head"


class SequenceToSequence(CausalLanguageModel):
    """The labels of a row are the tokens of its target, with the marks that the tokenizer adds."""

    name = "sequence_to_sequence"
    ending = "ForConditionalGeneration"
    rows = RowReader(("text", "target"), optional=(), label=None)
    of_metrics: ClassVar[Mapping[str, RowReader]] = {
        "choice_accuracy": ROWS_OF_CHOICES,
        "choice_accuracy_normalised": ROWS_OF_CHOICES,
    }
    is_causal: ClassVar[bool] = False

    @classmethod
    def head_on(cls, family: Family, found: Architecture) -> Head | None:
        """Return the head: the output layer, and what the class adds to logits; None without a decoder."""
        if family.decoder is None or f"{OUTPUT_LAYER}.weight" not in found.all_names:
            return None
        return Head(found.name, (OUTPUT_LAYER,), merges=True, parameters=tuple(sorted(found.buffers)))
