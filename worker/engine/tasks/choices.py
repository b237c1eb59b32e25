"""Candidate answers that are ranked by their likelihood after a text, as lm-evaluation-harness ranks them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, LabelMap
from worker.engine.inputs.examples import Example, Tokenized, encode
from worker.engine.tasks.causal_language_model import CausalLanguageModelHead
from worker.engine.tasks.kind import Running
from worker.engine.tasks.metrics import Array

ROWS = 64
"""Number of rows whose choices are batched together; progress is told after as many."""


@dataclass(frozen=True)
class Choices(Example):
    """A row with several answers. Its label is the place of the right one, its encoding the tokens of all of them."""

    sequences: tuple[Example, ...] = ()
    """The text with each of the answers, whose tokens are the labels."""
    characters: tuple[int, ...] = ()
    """Lengths of the answers."""
    right: int = 0
    """Place of the right answer."""


class Ranking(CausalLanguageModelHead):
    """A row is right if no answer has a greater log-likelihood than the right one, and no earlier one an equal one.

    The metrics are `acc` and, if log-likelihoods are divided by the answers' lengths in characters, `acc_norm` of
    lm-evaluation-harness. The prediction of a row is whether it is right, by how much the right answer is ahead of the
    best other one, and 1.
    """

    def __init__(self, task: CausalLanguageModel, model: nn.Module | None, by_character: bool) -> None:
        super().__init__(task, model)
        self._by_character = by_character

    def tokenized(
        self,
        rows: Sequence[Row],
        spec: DatasetSpec,
        tokenizer: Any,
        max_length: int,
        labels: LabelMap | None,
        first: int = 0,
    ) -> Tokenized:
        """Make an example of each row. No row is cut.

        As in lm-evaluation-harness (`_encode_pair`), white space that ends the text belongs to the answer, and an
        answer's tokens are those of the whole, without as many as the text alone has.

        Raises:
            InvalidDataset: a row has no label, an answer has no token, or a text with its answer is longer than the
                limit.
        """
        limit = min(max_length, spec.max_length or max_length)
        mark = tokenizer.bos_token or tokenizer.eos_token
        examples: list[Example] = []
        for index, row in enumerate(rows):
            if not isinstance(row.text, str) or row.choices is None or not isinstance(row.label, int):
                raise InvalidDataset(spec.source, "the row has no choices, or no label", row.place)
            text = row.text.rstrip()
            texts = [text, *(f"{row.text}{choice}" for choice in row.choices)]
            special = not (mark and text.startswith(mark))  # a text that begins with the mark has it already
            [context, *wholes] = encode(tokenizer, texts, spec.source, add_special_tokens=special)["input_ids"]
            if not context:
                raise InvalidDataset(spec.source, "its text has no token, so that no answer follows on one", row.place)
            sequences = []
            for number, whole in enumerate(wholes):
                answer = whole[len(context) :]
                if not answer:
                    problem = f"choice {number} has no token of its own after the text; end the text with a space"
                    raise InvalidDataset(spec.source, problem, row.place)
                length = len(context) + len(answer)
                if length > limit:
                    problem = f"the text with choice {number} has {length} tokens, and {limit} are allowed"
                    raise InvalidDataset(spec.source, problem, row.place)
                sequences.append(_sequence(row, context, answer, tokenizer.model_input_names))
            joined = [token for sequence in sequences for token in sequence.encoding["input_ids"]]
            found = Choices(index, row.place, {"input_ids": joined}, row.label)
            lengths = tuple(map(len, row.choices))
            examples.append(replace(found, sequences=tuple(sequences), characters=lengths, right=row.label))
        return Tokenized(examples, truncated=0)

    def predictions(self, examples: Sequence[Example], running: Running) -> Array:
        """Run the model on every answer, and return predictions of rows, (rows, 3)."""
        found = self.unknown(examples)
        for start in range(0, len(examples), ROWS):
            rows = [example for example in examples[start : start + ROWS] if isinstance(example, Choices)]
            sequences = [sequence for row in rows for sequence in row.sequences]
            still = replace(running, on_rows=lambda _: running.on_rows(0))
            likelihoods = -super().predictions(sequences, still)[:, 0]
            ends = np.cumsum([len(row.sequences) for row in rows])[:-1]
            for place, (row, own) in enumerate(zip(rows, np.split(likelihoods, ends), strict=True), start):
                found[place] = self._row(row, own)
            running.on_rows(len(rows))
        return found

    def _row(self, row: Choices, likelihoods: Array) -> tuple[bool, float, int]:
        scores = likelihoods / np.array(row.characters) if self._by_character else likelihoods
        margin = scores[row.right] - np.delete(scores, row.right).max()
        return bool(scores.argmax() == row.right), float(margin), 1


def _sequence(row: Row, context: Sequence[int], answer: Sequence[int], inputs: Sequence[str]) -> Example:
    """Make the example of a text with one answer, with those of the model's inputs that it may need."""
    tokens = [*context, *answer]
    positions = tuple(range(len(context) - 1, len(tokens) - 1))
    encoding = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "token_type_ids": [0] * len(tokens)}
    wanted = {name: values for name, values in encoding.items() if name in inputs}
    return Example(0, row.place, wanted, tuple(answer), positions)
