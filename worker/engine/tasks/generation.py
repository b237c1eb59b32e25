"""What a model writes after a text, compared with what it should write."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.catalog.contracts.prediction import Answer, TextAnswer
from worker.engine.catalog.contracts.spec import EvaluationSpec
from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import NEW_TOKENS, DatasetSpec
from worker.engine.catalog.planning.memory import HELD_TOKENS
from worker.engine.catalog.primitives.answers import answer_in, answer_pattern
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import CausalLanguageModel, LabelMap
from worker.engine.inputs.chats import as_prompt
from worker.engine.inputs.examples import BLOCK_ROWS, Example, Tokenized, encode
from worker.engine.runtime.device import computing_in
from worker.engine.runtime.libraries import transformers
from worker.engine.tasks.causal_language_model import CausalLanguageModelHead
from worker.engine.tasks.kind import Running
from worker.engine.tasks.metrics import Array


@dataclass(frozen=True)
class Prompt(Example):
    """A text to go on from, and what should follow."""

    target: str = ""


class Writing(CausalLanguageModelHead):
    """A row is right if the answer in what the model writes is that in its target.

    The model writes greedily: each token is the likeliest one, whatever the checkpoint's generation_config.json says of
    sampling and penalties. It ends with one of the end tokens there, a text of `stop`, or `max_new_tokens`. The
    prediction of a row is whether it is right, the number of tokens written, without an end token, 1, and whether the
    pattern of answers is found in it, or NaN without a pattern.
    """

    goes_on: ClassVar[bool] = True
    """Whether what is written follows on the text's own tokens, and not on a decoder's start token."""

    def __init__(self, task: CausalLanguageModel, model: nn.Module | None, evaluation: EvaluationSpec) -> None:
        super().__init__(task, model)
        self._stop = tuple(evaluation.stop or ())
        self._most = evaluation.max_new_tokens or NEW_TOKENS
        self._pattern = None if evaluation.answer is None else answer_pattern(evaluation.answer)

    @property
    def shape(self) -> tuple[int, ...]:
        return (4,)

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

        Raises:
            InvalidDataset: a row has no token, or leaves no room for `max_new_tokens` within the limit.
        """
        limit = min(max_length, spec.max_length or max_length)
        with_marks = spec.messages is None  # a chat template writes them
        if spec.messages is not None:
            rows = [as_prompt(row, tokenizer, spec) for row in rows]
        found = encode(tokenizer, [row.text for row in rows], spec.source, add_special_tokens=with_marks)
        names = [name for name in found if name in tokenizer.model_input_names]
        examples: list[Example] = []
        for index, row in enumerate(rows):
            encoding = {name: found[name][index] for name in names}
            length = len(encoding["input_ids"])
            if not length:
                raise InvalidDataset(spec.source, "no tokens", row.place)
            if length + self._most > limit:
                problem = f"its {length} tokens leave no room for {self._most} more, since {limit} are allowed"
                raise InvalidDataset(spec.source, f"{problem}; set a smaller max_new_tokens", row.place)
            examples.append(Prompt(index, row.place, encoding, None, target=str(row.target)))
        return Tokenized(examples, truncated=0)

    def predictions(self, examples: Sequence[Example], running: Running) -> Array:
        """Let the model write, and return predictions of rows, (rows, 4)."""
        found = self.unknown(examples)
        for place, row, text, tokens in self._all_written(examples, running):
            fits = np.nan if self._pattern is None else answer_in(text, self._pattern) is not None
            found[place] = self._is_right(text, row.target), tokens, 1, fits
        return found

    def answered(self, examples: Sequence[Example], running: Running) -> list[Answer]:
        found: dict[int, Answer] = {
            place: TextAnswer(text=text, tokens=tokens)
            for place, _, text, tokens in self._all_written(examples, running)
        }
        return [found[row] for row in range(len(examples))]

    def _all_written(self, examples: Sequence[Example], running: Running) -> Iterator[tuple[int, Prompt, str, int]]:
        """Let the model write, and yield the place of each row, the row, what follows on it, and how many tokens."""
        prompts = [example for example in examples if isinstance(example, Prompt)]
        with self._greedily(running.padding), torch.inference_mode():
            for places in self._batches(prompts):
                rows = [prompts[place] for place in places]
                for place, row, (text, tokens) in zip(places, rows, self._written(rows, running), strict=True):
                    yield place, row, text, tokens
                running.on_rows(len(rows))

    def _is_right(self, text: str, target: str) -> bool:
        wanted = answer_in(target, self._pattern)
        return answer_in(text, self._pattern) == (target.strip() if wanted is None else wanted)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Yield places of rows of similar length."""
        for start in range(0, len(prompts), BLOCK_ROWS):
            block = range(start, min(start + BLOCK_ROWS, len(prompts)))
            current: list[int] = []
            for place in sorted(block, key=lambda place: prompts[place].length):
                if current and (len(current) + 1) * (prompts[place].length + self._most) > HELD_TOKENS:
                    yield current
                    current = []
                current.append(place)
            yield current

    def _written(self, rows: Sequence[Prompt], running: Running) -> list[tuple[str, int]]:
        """Return what the model writes after each row, and the number of its tokens."""
        longest = max(row.length for row in rows)

        def padded(row: Prompt, name: str) -> list[int]:
            padding, tokens = [running.padding[name]] * (longest - row.length), row.encoding[name]
            return [*padding, *tokens] if self.goes_on else [*tokens, *padding]

        inputs = {
            name: torch.tensor([padded(row, name) for row in rows], device=running.device) for name in rows[0].encoding
        }
        before = longest if self.goes_on else 1
        watch = _Watch(rows, before, self._stop, self._model.generation_config.eos_token_id, running)
        with computing_in(running.precision, running.device):
            self._model.generate(**inputs, logits_processor=[watch.check], stopping_criteria=[watch.are_done])
        return list(zip(watch.texts, watch.lengths, strict=True))

    @contextmanager
    def _greedily(self, padding: Mapping[str, int]) -> Iterator[None]:
        """Give the model settings of generation of which only the end tokens are the checkpoint's."""
        own = self._model.generation_config
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self._most,
            decoder_start_token_id=getattr(self._model.config, "decoder_start_token_id", None),
            eos_token_id=own.eos_token_id,
            pad_token_id=padding["input_ids"],
        )
        try:
            yield
        finally:
            self._model.generation_config = own


class _Watch:
    """Watches rows being written: where they end, and whether logits are finite.

    Args:
        before: number of tokens, with padding, before those that are written.
    """

    def __init__(
        self,
        rows: Sequence[Prompt],
        before: int,
        stop: Sequence[str],
        ends: int | Sequence[int] | None,
        running: Running,
    ) -> None:
        self._rows, self._before, self._stop, self._running = rows, before, stop, running
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self._is_done = [False] * len(rows)
        self.texts = [""] * len(rows)
        self.lengths = [0] * len(rows)

    def check(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return the logits, as a processor of transformers. Raises NumericalError, which names the row."""
        is_finite = torch.isfinite(logits).all(1).tolist()
        if not all(is_finite):
            raise self._running.not_finite(self._rows[is_finite.index(False)].place)
        return logits

    def are_done(self, tokens: Tensor, logits: Tensor, **_: Any) -> Tensor:
        """Return whether each row is written, (batch,), as a stopping criterion of transformers."""
        written = tokens[:, self._before :].tolist()
        for row, of_row in enumerate(written):
            if self._is_done[row]:
                continue
            if of_row[-1] in self._ends:
                self._is_done[row] = True
                continue
            self.lengths[row] = len(of_row)
            text = self._running.tokenizer.decode(of_row, skip_special_tokens=True)
            ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
            self._is_done[row] = bool(ends)
            self.texts[row] = text[: min(ends)] if ends else text
        self._running.on_rows(0)  # which may stop the job
        return torch.tensor(self._is_done, device=tokens.device)
