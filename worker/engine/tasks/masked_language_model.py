"""Texts of which some tokens are hidden: the likelihood of a row is the product of these tokens', given all others.

As in BERT's pre-training (Devlin et al. 2019, section 3.1) 15 % of the tokens are hidden. There, a tenth of these are
replaced by other tokens and a tenth are left, so that a model also learns from tokens that are no mask. Here nothing is
learnt, and the mask takes the place of all of them.
"""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, Label
from worker.engine.inputs.examples import Answers
from worker.engine.tasks.causal_language_model import CausalLanguageModelHead
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import HeadKind
from worker.engine.tasks.next_tokens import read_by

SHARE = 0.15


class MaskedLanguageModelHead(CausalLanguageModelHead):
    """The outputs of a model are what the layer that gives logits reads. All else is as in causal language models."""

    def evaluated(self, evaluation: EvaluationSpec) -> HeadKind[CausalLanguageModel]:
        return self

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model up to its last layer, and return what that reads, (batch, tokens, width)."""
        return read_by(self._layer.linear, self._model, inputs)

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        """Hide tokens. They are drawn from the row's tokens alone, so that equal rows hide the same ones."""
        if encoding is None:
            raise InvalidDataset(source, "the checkpoint's tokenizer does not say which tokens are special")
        tokens = encoding.ids
        digest = hashlib.blake2b(struct.pack(f"<{len(tokens)}I", *tokens), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
        draws = {
            place: uniform(seed, place) for place, special in enumerate(encoding.special_tokens_mask) if not special
        }
        if not draws:
            raise InvalidDataset(source, "it has no token that could be hidden", row.place)
        chosen = [place for place, draw in draws.items() if draw < SHARE] or [
            min(draws, key=lambda place: draws[place])
        ]
        return Answers(tuple(chosen), tuple(tokens[place] for place in chosen), hidden=tuple(chosen))


KIND = MaskedLanguageModelHead
