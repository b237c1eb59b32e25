"""Candidate answers that are ranked by their likelihood after a text, as lm-evaluation-harness ranks them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, LabelMap
from worker.engine.inputs.examples import DECODER_INPUTS, Batch, Example, Tokenized, encode
from worker.engine.tasks.causal_language_model import CausalLanguageModelHead
from worker.engine.tasks.kind import Running
from worker.engine.tasks.metrics import Array
from worker.engine.tasks.next_tokens import log_probabilities

ROWS = 64
"""Number of rows whose choices are batched together; progress is told after as many."""


@dataclass(frozen=True)
class Choices(Example):
    """A row with several answers. Its label is the place of the right one, its encoding the tokens of all of them."""

    sequences: tuple[Example, ...] = ()
    """What the model reads: the text with an answer up to its last token, once for all answers that differ in that
    alone. The label of a position is a tuple of these answers' tokens."""
    answers: tuple[tuple[int, ...], ...] = ()
    """Places of the answers of each sequence."""
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
        examples: list[Example] = []
        for index, row in enumerate(rows):
            if not isinstance(row.text, str) or row.choices is None or not isinstance(row.label, int):
                raise InvalidDataset(spec.source, "the row has no choices, or no label", row.place)
            context, answers = self.tokens_of(row.text, row.choices, spec.source, tokenizer)
            if not context:
                raise InvalidDataset(spec.source, "its text has no token, so that no answer follows on one", row.place)
            followed: dict[tuple[int, ...], list[int]] = {}
            for number, answer in enumerate(answers):
                if not answer:
                    problem = f"choice {number} has no token of its own after the text; end the text with a space"
                    raise InvalidDataset(spec.source, problem, row.place)
                length = self.length_of(context, answer)
                if length > limit:
                    problem = f"the text with choice {number} has {length} tokens, and {limit} are allowed"
                    raise InvalidDataset(spec.source, problem, row.place)
                followed.setdefault(tuple(answer[:-1]), []).append(number)
            found = Choices(
                index,
                row.place,
                {"input_ids": [token for answer in answers for token in (*context, *answer)]},
                row.label,
                sequences=tuple(
                    _sequence(row, self.read(context, before, spec.source), [answers[n] for n in places], tokenizer)
                    for before, places in followed.items()
                ),
                answers=tuple(map(tuple, followed.values())),
                characters=tuple(map(len, row.choices)),
                right=row.label,
            )
            examples.append(found)
        return Tokenized(examples, truncated=0)

    def tokens_of(
        self, text: str, choices: Sequence[str], source: str, tokenizer: Any
    ) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of a text, and of each of the answers after it."""
        mark, context = tokenizer.bos_token or tokenizer.eos_token, text.rstrip()
        special = not (mark and context.startswith(mark))  # a text that begins with the mark has it already
        texts = [context, *(f"{text}{choice}" for choice in choices)]
        [tokens, *wholes] = encode(tokenizer, texts, source, add_special_tokens=special)["input_ids"]
        return tokens, [whole[len(tokens) :] for whole in wholes]

    def length_of(self, context: Sequence[int], answer: Sequence[int]) -> int:
        """Return the number of tokens that the limit is of."""
        return len(context) + len(answer)

    def read(self, context: Sequence[int], before: Sequence[int], source: str) -> Mapping[str, list[int]]:
        """Return what the model reads of a text and of the tokens before an answer's last, by the model's inputs.

        The last position is that before the answer's last token.
        """
        tokens = [*context, *before]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "token_type_ids": [0] * len(tokens)}

    def predictions(self, examples: Sequence[Example], running: Running) -> Array:
        """Run the model on every answer, and return predictions of rows, (rows, 3)."""
        found = self.unknown(examples)
        for start in range(0, len(examples), ROWS):
            rows = [example for example in examples[start : start + ROWS] if isinstance(example, Choices)]
            most = max((len(answers) for row in rows for answers in row.answers), default=0)
            sequences = [_padded(sequence, most) for row in rows for sequence in row.sequences]
            likelihoods: dict[int, list[float]] = {}
            for part, judged in self.parts(sequences, running):
                likelihoods.update(zip(part.predictions, judged.tolist(), strict=True))
                running.on_rows(0)
            of_sequences = (likelihoods[number] for number in range(len(sequences)))
            for place, row in enumerate(rows, start):
                own = np.empty(len(row.characters))
                for answers in row.answers:
                    own[list(answers)] = next(of_sequences)[: len(answers)]
                found[place] = self._row(row, own)
            running.on_rows(len(rows))
        return found

    def judged(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the log-likelihoods of every sequence's answers, (batch, answers), float64."""
        if batch.labels is None:
            raise TypeError("the batch was read without labels")
        positions = batch.required_positions
        each = log_probabilities(outputs[positions], self._layer, batch.labels).double()
        found = torch.zeros(len(batch), each.shape[1], dtype=torch.float64, device=outputs.device)
        return found.index_add(0, positions.nonzero()[:, 0], each)

    def _row(self, row: Choices, likelihoods: Array) -> tuple[bool, float, int]:
        scores = likelihoods / np.array(row.characters) if self._by_character else likelihoods
        margin = scores[row.right] - np.delete(scores, row.right).max()
        return bool(scores.argmax() == row.right), float(margin), 1


def _sequence(row: Row, read: Mapping[str, list[int]], answers: Sequence[Sequence[int]], tokenizer: Any) -> Example:
    """Make the example of what is read before the last token of some answers, which alone they differ in."""
    names = (*tokenizer.model_input_names, *DECODER_INPUTS)
    encoding = {name: values for name, values in read.items() if name in names}
    last = len(read.get(DECODER_INPUTS[0], read["input_ids"]))
    positions = tuple(range(last - len(answers[0]), last))
    return Example(0, row.place, encoding, tuple(zip(*answers, strict=True)), positions)


def _padded(sequence: Example, answers: int) -> Example:
    """Repeat the last answer's tokens until there are as many answers, since a batch has as many for all sequences."""
    return replace(sequence, label=tuple((*of, *([of[-1]] * (answers - len(of)))) for of in sequence.labels))
