"""Finds by trials how many tokens are best computed at once. The number is remembered and recorded, to repeat a run."""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch

from worker.engine.catalog.methods import BATCH_TOKENS, LARGEST_BATCH_TOKENS
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, rounded_weights
from worker.engine.runtime.progress import OnRows
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.scorer import score

CANDIDATES = {
    "cpu": (1024, BATCH_TOKENS, LARGEST_BATCH_TOKENS),
    "cuda": (4096, 8192, 16384, 32768, 65536, 131072),
}
UNTRIED = {"cpu": BATCH_TOKENS, "cuda": 16384}
TRIAL_SHARE = 0.05  # share of the work to come; where trials would take more, they cost more than they save
WORTH = 0.03  # a larger batch must save more than this share of the time

logger = logging.getLogger(__name__)


class BatchSizes:
    """Numbers of padded tokens in a batch, by all that decides its speed, kept as long as the engine process lives."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], int] = {}

    def find(
        self,
        loaded: LoadedModel,
        examples: Sequence[Example],
        rows: int,
        estimator: Estimator,
        precision: Precision,
        source: str,
        on_rows: OnRows,
    ) -> int:
        """Find the number for `rows` rows like `examples`. Trials leave no trace in any score."""
        longest = max(example.length for example in examples)
        key = _situation(loaded, longest, estimator, precision)
        if key not in self._found:
            candidates = CANDIDATES[loaded.device.type]
            to_come = rows * sum(example.length for example in examples) / len(examples)
            if sum(candidates) + candidates[0] > TRIAL_SHARE * to_come:
                return UNTRIED[loaded.device.type]

            def attempt(batch: Sequence[Example]) -> None:
                score(loaded, batch, estimator, precision, source, lambda _: on_rows(0), batches=[batch])

            with rounded_weights(loaded.model, precision):  # once, instead of in each trial
                self._found[key] = _fastest(attempt, examples, candidates)
            logger.info("%d tokens at once are the fastest for %s", self._found[key], loaded.info.architecture)
        return self._found[key]


def _situation(loaded: LoadedModel, longest: int, estimator: Estimator, precision: Precision) -> tuple[object, ...]:
    shapes = tuple(tuple(parameter.shape) for parameter in loaded.model.parameters())
    length = longest.bit_length()  # attention's share of the time grows with it
    head, device = type(loaded.kind), loaded.device.type
    return shapes, length, estimator.name, head, precision, loaded.holding, device, torch.get_num_threads()


def _fastest(
    attempt: Callable[[Sequence[Example]], None], examples: Sequence[Example], candidates: Sequence[int]
) -> int:
    """Find the smallest number of tokens that no larger one beats by `WORTH` in seconds a token, as memory allows."""
    ordered = sorted(examples, key=lambda example: example.length)
    typical = ordered[len(ordered) // 2 :]  # the longer half, which takes most of the time and memory

    def seconds_per_token(tokens: int) -> float:
        batch = list(islice(cycle(typical), max(1, tokens // typical[-1].length)))
        start = time.perf_counter()
        attempt(batch)  # its sums are on the CPU, so it is done on any device
        return (time.perf_counter() - start) / (len(batch) * max(example.length for example in batch))

    seconds_per_token(candidates[0])  # the set-up of a first pass is not counted
    best, least = candidates[0], float("inf")
    for tokens in candidates:
        try:
            seconds = seconds_per_token(tokens)
        except RuntimeError as error:
            if tokens == candidates[0] or not is_out_of_memory(error):
                raise
            break
        if seconds < least * (1 - WORTH):
            best, least = tokens, seconds
    torch.cuda.empty_cache()  # after the exception, which holds the tensors that did not fit
    return best
