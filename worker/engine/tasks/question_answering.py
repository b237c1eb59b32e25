"""Answers to questions are spans of a context: the likelihood is that of the span's first token times that of its last.

Both are softmaxes over the row's tokens. That there is no answer is the span of the first token alone, as in
transformers. A context that is longer than the limit is read in windows that overlap, each with the question, as in
transformers' run_qa.py. The likelihood of such a row is the product of its windows', and in a window without the whole
answer, there is none.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine.catalog.data.rows import Row
from worker.engine.catalog.data.spec import DatasetSpec
from worker.engine.catalog.primitives.errors import InvalidDataset
from worker.engine.catalog.tasks import Label, MetricName, QuestionAnswering
from worker.engine.inputs.examples import Answers, Batch, Example, Passage, Truncation, encode
from worker.engine.tasks import squad
from worker.engine.tasks.classification import drawn
from worker.engine.tasks.drawing import uniform
from worker.engine.tasks.kind import EstimatorName, HeadKind, Passes, ResolvedEstimator, one_pass
from worker.engine.tasks.metrics import Array, Metric, ResampledMetric
from worker.engine.tasks.smoothing import scaled

LONGEST_ANSWER = 30  # tokens, as in SQuAD's and transformers' scripts
LIKELIEST = 20  # spans of a row that a smoothed metric counts, the `n_best_size` of run_qa.py
STRIDE = 128  # tokens that neighbouring windows share, as in run_qa.py; half of what they have of the context at most


class QuestionAnsweringHead(HeadKind[QuestionAnswering]):
    """Every token of a row has two outputs, as the first token of an answer and as its last.

    The prediction of a row is what its metrics need: exact match and F1 of the likeliest span, and by how much the
    logits of no answer exceed those of this span.
    """

    truncation: Truncation = "only_second"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3,)

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model, and return its logits, (batch, tokens, 2)."""
        if self.model is None:
            raise TypeError("this head has no model to run")
        found = self.model(**inputs)
        return torch.stack([found.start_logits, found.end_logits], dim=-1)

    def check_room(self, rows: Sequence[Row], spec: DatasetSpec, tokenizer: Any, limit: int) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        questions = encode(tokenizer, [row.text for row in rows], spec.source, add_special_tokens=False)["input_ids"]
        for row, tokens in zip(rows, questions, strict=True):
            if len(tokens) + special >= limit:
                problem = f"its question has {len(tokens)} tokens, so that {limit} have no room for its context"
                raise InvalidDataset(spec.source, problem, row.place)

    def overlap(self, row: Row, encoding: Any, spec: DatasetSpec) -> int | None:
        room: int = encoding.sequence_ids.count(1)
        if spec.doc_stride is None:
            return min(STRIDE, room // 2)
        if spec.doc_stride >= room:
            problem = f"a window has {room} tokens of its context, so that doc_stride {spec.doc_stride} never ends"
            raise InvalidDataset(spec.source, f"{problem}; set a smaller one", row.place)
        return spec.doc_stride

    def answers(self, row: Row, encoding: Any, label: Label | None, source: str) -> Answers:
        if encoding is None:
            raise InvalidDataset(source, "the checkpoint's tokenizer does not say which text a token is of")
        context = str(row.text_pair)
        parts = zip(encoding.sequence_ids, encoding.offsets, strict=True)
        spans = tuple((start, end) if part == 1 and end > start else None for part, (start, end) in parts)
        if not any(spans):
            problem = f"none of its {len(spans)} tokens is of the context"
            raise InvalidDataset(source, problem, row.place)
        texts: tuple[str, ...] = ()
        found: tuple[int, int] | None = None
        if isinstance(label, tuple):
            for text, start in label:
                if context[start : start + len(text)] != text:
                    raise InvalidDataset(source, f"an answer is not at character {start} of its context", row.place)
            texts = tuple(text for text, _ in label)
            found = _tokens_of(spans, *label[0]) if label else (0, 0)
        passage = Passage(context, spans, None if label is None else texts)
        return Answers(tuple(range(len(spans))), found, passage)

    def predictions_of(self, example: Example) -> int:
        return 1

    def estimator(self, asked: EstimatorName) -> ResolvedEstimator:
        """Return the estimator; labels are drawn by default, since the expectation takes two passes for each token."""
        if asked == "expected":
            raise ValueError("the expectation over all spans takes too long")
        return "sampled" if asked == "auto" else asked

    def loss_per_likelihood(self, batch: Batch) -> float:
        """Return the ratio for a loss that is the mean over windows of that of the first token and that of the last."""
        return 0.5 * len(batch) / len(batch.required_positions)

    def expected(self, logits: Tensor, batch: Batch) -> Passes:
        raise ValueError("the expectation over all spans takes too long")

    def sampled(self, logits: Tensor, batch: Batch, seed: int) -> Passes:
        tokens = batch.required_positions
        last = tokens.sum(1) - 1
        rows, windows = (found.tolist() for found in batch.sequences)
        labels = []
        for end in (0, 1):
            draws = [
                uniform(seed, int(batch.indices[row]), 2 * window + end)
                for row, window in zip(rows, windows, strict=True)
            ]
            found = drawn(_of_row(logits[..., end], tokens), torch.tensor(draws, dtype=torch.float64))
            labels.append(torch.minimum(found, last))
        return self._one_pass(logits, batch, torch.stack(labels, dim=1))

    def empirical(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        return self._one_pass(logits, batch, labels.view(-1, 2))

    def _one_pass(self, logits: Tensor, batch: Batch, labels: Tensor) -> Passes:
        """Differentiate the likelihood of first and last tokens, (batch, 2), of each row's windows together."""
        probabilities = _of_row(logits, batch.required_positions[..., None]).detach().double().softmax(1)
        own = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
        weights, [of_windows] = one_pass(logits, own - probabilities)
        return weights[: len(batch)], [batch.by_row(of_windows)]

    def decision(self, logits: Tensor) -> Tensor:
        raise TypeError("answers are decided by their rows, see `predicted`")

    def predicted(self, logits: Tensor, examples: Sequence[Example] = ()) -> Array:
        """Return what the metrics need of each row, (rows, 3); see the class."""
        parts = torch.split(logits.cpu().double(), [example.outputs for example in examples])
        return np.array([_judged(part.numpy(), example) for part, example in zip(parts, examples, strict=True)])

    def truth(self, examples: Sequence[Example]) -> Array:
        """Return 1 for each row whose question has no answer, else 0."""
        return np.array([float(not _passage(example).answers) for example in examples])

    def metric(self, name: MetricName) -> Metric:
        """Return the mean over rows. Only where a row has no answer can a model say that there is none."""
        return lambda labels, predictions: float(_values(name, labels, predictions).mean())

    def resampled(self, name: MetricName, labels: Array, predictions: Sequence[Array]) -> ResampledMetric:
        values = np.stack([_values(name, labels, one) for one in predictions])
        return lambda counts: np.asarray(values @ counts / counts.sum(0))

    def smoothed(self, name: MetricName, labels: Array, logits: Tensor, examples: Sequence[Example] = ()) -> float:
        """Return the expected metric of each row's likeliest answers, which are like classes.

        They are its `LIKELIEST` likeliest spans, and, where some row has no answer, that there is none.
        """
        parts = torch.split(logits.cpu().double(), [example.outputs for example in examples])
        measure = squad.exact_match if name == "exact_match" else squad.f1
        decisive: list[Tensor] = []
        values: list[Array] = []
        for part, example, label in zip(parts, examples, labels, strict=True):
            spans, none = _answers(part.numpy(), example, LIKELIEST)
            passage = _passage(example)
            found = [measure(passage.text[begins:last], passage.answers or ()) for _, (begins, last) in spans]
            sums = [best for best, _ in spans]
            if labels.any():
                found, sums = [*found, float(label)], [*sums, none]
            own = torch.tensor(sums, dtype=torch.float64)
            decisive.append(own - own.mean())
            values.append(np.array(found))
        of_rows = torch.split(scaled(torch.cat(decisive)), [len(own) for own in decisive])
        expected = [of_row.softmax(0).numpy() @ found for of_row, found in zip(of_rows, values, strict=True)]
        return float(np.mean(expected))


KIND = QuestionAnsweringHead


def _of_row(logits: Tensor, tokens: Tensor) -> Tensor:
    """Replace the logits of padding, so that they have no share in a softmax."""
    return logits.masked_fill(~tokens, -torch.inf)


def _tokens_of(spans: Sequence[tuple[int, int] | None], text: str, start: int) -> tuple[int, int]:
    """Return the first and the last token of an answer; (0, 0) if its tokens are not all there."""
    places = [place for place, span in enumerate(spans) if span is not None]
    first = [place for place in places if (spans[place] or (0, 0))[0] <= start]
    last = [place for place in places if (spans[place] or (0, 0))[1] >= start + len(text)]
    return (first[-1], last[0]) if first and last and first[-1] <= last[0] else (0, 0)


def _passage(example: Example) -> Passage:
    if example.passage is None:
        raise TypeError("the row was read for another kind of head")
    return example.passage


def _judged(logits: Array, example: Example) -> tuple[float, float, float]:
    """Judge the likeliest span of all windows by logits, (tokens, 2); that there is no answer, all windows must say."""
    passage = _passage(example)
    if passage.answers is None:
        raise TypeError("the row was read without its answers")
    [(best, (begins, last))], none = _answers(logits, example, 1)
    answer = passage.text[begins:last]
    return squad.exact_match(answer, passage.answers), squad.f1(answer, passage.answers), none - best


def _answers(logits: Array, example: Example, count: int) -> tuple[list[tuple[float, tuple[int, int]]], float]:
    """Return the likeliest spans of all windows, the first being the likeliest, and the logit of no answer.

    Args:
        logits: (tokens, 2).
        count: number of spans, of which there may be fewer; a span that several windows have counts once.
    """
    passage = _passage(example)
    windows = [
        slice(*bounds) for bounds in pairwise(accumulate((len(one["input_ids"]) for one in example.inputs), initial=0))
    ]
    found = [span for one in windows for span in _likeliest(logits[one], passage.spans[one], count)]
    best: dict[tuple[int, int], float] = {}
    for value, place in sorted(found, key=lambda span: -span[0]):
        best.setdefault(place, value)
    none = min(float(logits[one.start].sum()) for one in windows)
    return [(value, place) for place, value in best.items()][:count], none


def _likeliest(
    logits: Array, spans: Sequence[tuple[int, int] | None], count: int
) -> list[tuple[float, tuple[int, int]]]:
    """Return the greatest sums of logits of spans of the context, with up to `LONGEST_ANSWER` tokens, and their places.

    Args:
        logits: of one window's tokens, (tokens, 2).
        spans: see `Passage.spans`.
    """
    is_context = np.array([span is not None for span in spans])
    start, end = (np.where(is_context, logits[:, side], -np.inf) for side in (0, 1))
    sums = np.full((min(LONGEST_ANSWER, len(start)), len(start)), -np.inf)
    for more in range(len(sums)):
        sums[more, : len(start) - more] = start[: len(start) - more] + end[more:]
    flat = sums.ravel()
    found = []
    for place in [flat.argmax()] if count == 1 else np.argsort(-flat, kind="stable")[:count]:
        more, first = divmod(int(place), len(start))
        if not np.isfinite(flat[place]):  # no span of the context is left
            break
        (begins, _), (_, ends) = (spans[token] or (0, 0) for token in (first, first + more))
        found.append((float(flat[place]), (begins, ends)))
    return found


def _values(name: MetricName, labels: Array, predictions: Array) -> Array:
    """Return the metric of each row."""
    of_span = predictions[:, 0 if name == "exact_match" else 1]
    says_none = labels.any() & (predictions[:, 2] > 0)
    return np.asarray(np.where(says_none, labels, of_span))
