"""Texts that are written after others were read: the likelihood of a target is the product of its tokens'.

A token is predicted from all of the text and from the target's tokens before it. As in transformers' classes, the
decoder reads the target shifted by one, after the start token of the model's configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, LabelMap
from worker.engine.inputs.examples import DECODER_INPUTS, Tokenized, encode, tokenize
from worker.engine.tasks.causal_language_model import CHOICES, WRITTEN, CausalLanguageModelHead
from worker.engine.tasks.choices import Ranking
from worker.engine.tasks.generation import Prompt, Writing
from worker.engine.tasks.kind import HeadKind
from worker.engine.tasks.next_tokens import OutputLayer, read_by


class SequenceToSequenceHead(CausalLanguageModelHead):
    """The outputs of a model are what its output layer reads of the decoder's tokens. Metrics are those of causal
    language models."""

    def evaluated(self, evaluation: EvaluationSpec) -> HeadKind[CausalLanguageModel]:
        if evaluation.metric in CHOICES:
            return SequenceToSequenceRanking(self.task, self.model, CHOICES[evaluation.metric])
        if evaluation.metric == WRITTEN:
            return SequenceToSequenceWriting(self.task, self.model, evaluation)
        return self

    def tokenized(
        self,
        rows: Sequence[Row],
        spec: DatasetSpec,
        tokenizer: Any,
        max_length: int,
        labels: LabelMap | None,
        first: int = 0,
    ) -> Tokenized:
        """Make an example of each row. Texts are cut at the limit, targets are not.

        Raises:
            InvalidDataset: a text or a target has no token, or a target is longer than the limit.
        """
        limit = min(max_length, spec.max_length or max_length)
        texts = tokenize([replace(row, target=None) for row in rows], spec, tokenizer, max_length, None, first)
        found = encode(tokenizer, [str(row.target) for row in rows], spec.source)
        if not found.encodings:
            raise InvalidDataset(spec.source, "the checkpoint's tokenizer does not say which tokens are special")
        examples = []
        for row, text, target in zip(rows, texts.examples, found.encodings, strict=True):
            if all(target.special_tokens_mask):
                problem = "no token is of its target; write what should follow, or leave the row out"
                raise InvalidDataset(spec.source, problem, row.place)
            if len(target.ids) > limit:
                problem = f"its target has {len(target.ids)} tokens, and {limit} are allowed"
                raise InvalidDataset(spec.source, f"{problem}; set a larger max_length, or leave it out", row.place)
            decoder = self.decoder_inputs(target.ids[:-1], spec.source)
            label, positions = tuple(target.ids), tuple(range(len(target.ids)))
            examples.append(replace(text, encoding={**text.encoding, **decoder}, label=label, positions=positions))
        return Tokenized(examples, texts.truncated)

    def decoder_inputs(self, before: Sequence[int], source: str) -> Mapping[str, list[int]]:
        """Return what the decoder reads to predict a token after those in `before`, and each of these."""
        read = [self._start(source), *before]
        return dict(zip(DECODER_INPUTS, (read, [1] * len(read)), strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run encoder and decoder, and return what the output layer reads, (batch, decoder tokens, width)."""
        return read_by(self._layer.linear, self._model, inputs)

    def _start(self, source: str) -> int:
        start = getattr(self._model.config, "decoder_start_token_id", None)
        if type(start) is not int or not 0 <= start < self.task.outputs:
            problem = "it cannot be read: the checkpoint's config.json has no usable decoder_start_token_id"
            raise InvalidDataset(source, problem)
        return start

    @property
    def _layer(self) -> OutputLayer:
        linear = self._model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{type(self._model).__name__} has no linear output layer")
        return OutputLayer(linear, offset=getattr(self._model, "final_logits_bias", None))


class SequenceToSequenceRanking(Ranking, SequenceToSequenceHead):
    """The encoder reads a row's text, and the decoder each of the answers. As in lm-evaluation-harness (`_encode_pair`
    with its backend `seq2seq`), answers are cut into tokens by themselves, and have no marks."""

    def tokens_of(
        self, text: str, choices: Sequence[str], source: str, tokenizer: Any
    ) -> tuple[list[int], list[list[int]]]:
        context = text.rstrip()
        answers = [f"{text[len(context) :]}{choice}" for choice in choices]
        [tokens] = encode(tokenizer, [context], source)["input_ids"]
        return tokens, encode(tokenizer, answers, source, add_special_tokens=False)["input_ids"]

    def length_of(self, context: Sequence[int], answer: Sequence[int]) -> int:
        """Return the length of the longer one, since the limit is of each."""
        return max(len(context), len(answer))

    def read(self, context: Sequence[int], before: Sequence[int], source: str) -> Mapping[str, list[int]]:
        return {**super().read(context, (), source), **self.decoder_inputs(before, source)}


class SequenceToSequenceWriting(Writing, SequenceToSequenceHead):
    """The encoder reads a row's text, and the decoder writes from its start token on."""

    goes_on = False

    def tokenized(
        self,
        rows: Sequence[Row],
        spec: DatasetSpec,
        tokenizer: Any,
        max_length: int,
        labels: LabelMap | None,
        first: int = 0,
    ) -> Tokenized:
        """Make an example of each row. Texts are cut at the limit.

        Raises:
            InvalidDataset: a text has no token, the limit is below `max_new_tokens`, or the model has no start token.
        """
        self._start(spec.source)
        limit = min(max_length, spec.max_length or max_length)
        if self._most > limit:
            problem = f"max_new_tokens is {self._most}, and a target may have {limit} tokens"
            raise InvalidDataset(spec.source, f"{problem}; set a smaller max_new_tokens")
        texts = tokenize([replace(row, target=None) for row in rows], spec, tokenizer, max_length, None, first)
        examples = [
            Prompt(text.index, row.place, text.encoding, None, target=str(row.target))
            for row, text in zip(rows, texts.examples, strict=True)
        ]
        return Tokenized(list(examples), texts.truncated)


KIND = SequenceToSequenceHead
