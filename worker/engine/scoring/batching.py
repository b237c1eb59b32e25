"""How many tokens are computed at once: found by trying, remembered, and written down so that a run can be repeated."""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice

import torch

from worker.engine.catalog.methods import BATCH_TOKENS, LARGEST_BATCH_TOKENS
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, rounded_weights
from worker.engine.runtime.resources import is_out_of_memory
from worker.engine.scoring.estimators import Estimator
from worker.engine.scoring.scorer import OnRows, score

CANDIDATES = {
    "cpu": (1024, BATCH_TOKENS, LARGEST_BATCH_TOKENS),
    "cuda": (4096, 8192, 16384, 32768, 65536, 131072),
}
UNTRIED = {"cpu": BATCH_TOKENS, "cuda": 16384}
TRIAL_SHARE = 0.05  # of the work to come; where trying would take more, it is not worth what it finds
WORTH = 0.03  # less time by more than this speaks for a larger batch

logger = logging.getLogger(__name__)


class BatchSizes:
    """Padded tokens of a batch, by all that decides how fast it is: kept as long as the engine process lives."""

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
        """The number for `rows` rows like `examples`. Trying leaves no trace in any score."""
        longest = max(example.length for example in examples)
        key = _situation(loaded, longest, estimator, precision)
        if key not in self._found:
            candidates = CANDIDATES[loaded.device.type]
            to_come = rows * sum(example.length for example in examples) / len(examples)
            if sum(candidates) + candidates[0] > TRIAL_SHARE * to_come:
                return UNTRIED[loaded.device.type]

            def attempt(batch: Sequence[Example]) -> None:
                score(loaded, batch, estimator, precision, source, lambda _: on_rows(0), batches=[batch])

            with rounded_weights(loaded.model, precision):  # that each trial would else do for itself
                self._found[key] = _fastest(attempt, examples, candidates)
            logger.info("%d tokens at once are the fastest for %s", self._found[key], loaded.info.architecture)
        return self._found[key]


def _situation(loaded: LoadedModel, longest: int, estimator: Estimator, precision: Precision) -> tuple[object, ...]:
    shapes = tuple(tuple(parameter.shape) for parameter in loaded.model.parameters())
    length = longest.bit_length()  # attention's share grows with it
    return shapes, length, type(estimator), type(loaded.kind), precision, loaded.device.type, torch.get_num_threads()


def _fastest(
    attempt: Callable[[Sequence[Example]], None], examples: Sequence[Example], candidates: Sequence[int]
) -> int:
    """The smallest number of tokens that no larger one beats by `WORTH`, seconds a token, as far as memory goes."""
    ordered = sorted(examples, key=lambda example: example.length)
    typical = ordered[len(ordered) // 2 :]  # the longer half: what takes most of the time, and of the memory

    def seconds_per_token(tokens: int) -> float:
        batch = list(islice(cycle(typical), max(1, tokens // typical[-1].length)))
        start = time.perf_counter()
        attempt(batch)  # its sums are on the CPU, so it is done on any device
        return (time.perf_counter() - start) / (len(batch) * max(example.length for example in batch))

    seconds_per_token(candidates[0])  # what a first pass sets up is not counted
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
    torch.cuda.empty_cache()  # after the exception, which holds what did not fit
    return best
