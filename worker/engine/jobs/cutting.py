"""Cuts long scoring into shards, which all workers take from the queue.

A job begins to score by itself. As soon as it has seen how long its rows take, and what is left would take two shards
or more, it stops and names the shards; when all of them are done, the job is run again and finds what they kept. The
cut depends on the time that rows take, and no bit of the result depends on the cut, see `worker.engine.scoring.pieces`.

A model whose scores of mask nodes are all that is wanted of its rows is cut by pieces. Where a model's rows give other
statistics too, its measuring is one shard. What stops by error bars (`examples: "auto"`) looks at all models after
every few rows, so it is not cut; nor is the preset `paper`, whose batches are those of the published code.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from worker.engine.catalog.contracts.spec import ShardWork
from worker.engine.catalog.contracts.statistics import Facts
from worker.engine.catalog.methods import NODE_FISHER, MethodParameters
from worker.engine.catalog.tasks import task_of
from worker.engine.jobs.context import JobContext
from worker.engine.merging.job_models import JobModel
from worker.engine.runtime.device import Precision
from worker.engine.scoring.batching import CANDIDATES, UNTRIED
from worker.engine.scoring.measurement import Subject
from worker.engine.scoring.passes import PASSES
from worker.engine.scoring.pieces import missing_pieces, pieces
from worker.engine.scoring.sample import Sample, block_ends

PROBED_SHARE = 0.1  # share of a shard's time in which the speed is seen; it is computed again, in the shards
MOST_SHARDS = 512  # of a job: more rows make longer shards, so that the queue stays short
LEAST_SHARDS = 2  # what is left takes the time of at least as many shards, or it is not cut
ALIKE = 0.01  # models of one architecture whose sizes differ by no more, as heads do, are run with as many tokens


class Cut(Exception):
    """The job's scoring is left to shards. `batch_tokens` is for `SharedScoring`."""

    def __init__(self, shards: Sequence[ShardWork], batch_tokens: dict[str, int]) -> None:
        super().__init__(f"the scoring is cut into {len(shards)} shards")
        self.shards = shards
        self.batch_tokens = batch_tokens


@dataclass(frozen=True)
class Part:
    """The measuring of one model for one method.

    Args:
        passes: number of passes over each row.
        also: statistics that others need of the same rows.
    """

    method: MethodParameters
    model: JobModel
    sample: Sample
    passes: int
    also: frozenset[str]
    precision: Precision

    @property
    def statistics(self) -> frozenset[str]:
        return self.method.statistics - self.model.given.keys()

    @property
    def can_be_cut(self) -> bool:
        stops = self.method.scoring is not None and self.method.scoring.tolerance is not None
        return not stops and self.method.batch_rows is None

    @property
    def beside(self) -> frozenset[str]:
        """Names of further statistics that are taken from its passes over the rows."""
        return frozenset(name for name in self.also if PASSES[name].beside is not None)

    @property
    def is_scored_alone(self) -> bool:
        """Whether scores are all that is taken from its passes over the rows."""
        return self.statistics == {NODE_FISHER} and not self.beside

    @cached_property
    def subject(self) -> Subject:
        task = task_of(self.model.info)
        return Subject(self.method, task, self.model.digest, self.sample, self.precision)

    @property
    def scores(self) -> Facts:
        return self.subject.facts_of_scores(len(self.sample))

    def facts(self, statistics: Iterable[str]) -> list[Facts]:
        return [PASSES[name].facts(self.subject, len(self.sample)) for name in statistics]

    def is_like(self, other: "Part") -> bool:
        """Return whether both models, and the longest of their rows, are about the same size."""
        sizes = [of.model.info.nbytes for of in (self, other)]
        lengths = {of.sample.longest().bit_length() for of in (self, other)}
        is_same = self.model.info.architecture == other.model.info.architecture
        return is_same and len(lengths) == 1 and abs(sizes[0] - sizes[1]) <= ALIKE * max(sizes)

    def work(self, rows: int, pieces: tuple[int, int] | None = None, batch_tokens: int | None = None) -> ShardWork:
        return ShardWork(
            model=self.model.name,
            method=self.method.model_copy(update={"precision": self.precision}),
            statistics=tuple(sorted(self.statistics)),
            also=tuple(sorted(self.also)),
            pieces=pieces,
            batch_tokens=batch_tokens,
            examples=rows,
        )


class Cutter:
    """Watches how fast a job's rows are computed, and cuts what is left of them.

    Args:
        parts: all that is to be measured, in its order.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, parts: Sequence[Part], context: JobContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = [part for part in parts if part.can_be_cut]
        self._store = context.store
        self._batch_tokens = context.batch_tokens
        self._device = context.device.type
        self._seconds = context.shard_seconds
        self._clock = clock
        self._began: float | None = None
        self._rows = 0
        self._look_at = PROBED_SHARE * (context.shard_seconds or 0.0)

    def computed(self, rows: int) -> None:
        """Count rows that were just computed. Raises Cut when what is left is to be cut."""
        if self._seconds is None or not rows:
            return
        if self._began is None:  # the first batch is not counted: trials may have come before it
            self._began = self._clock()
            return
        self._rows += rows
        taken = self._clock() - self._began
        if taken < self._look_at:
            return
        self._look_at = 2 * taken
        rows_each = self._rows / taken * self._seconds
        shards = self._shards(rows_each)
        if len(shards) > 1 and sum(shard.examples for shard in shards) >= LEAST_SHARDS * rows_each:
            raise Cut(shards, dict(self._batch_tokens))

    def _shards(self, rows_each: float) -> list[ShardWork]:
        """Return the shards of what is not kept yet, each of about so many rows where a model can be cut by rows."""
        covered: set[str] = set()
        shards: list[ShardWork] = []
        for part in self._parts:
            left = {facts.address for facts in part.facts(part.statistics) if not self._store.holds(facts)}
            if left <= covered:
                continue  # nothing is left, or it is another candidate's of `auto` too
            covered |= left | {facts.address for facts in part.facts(part.beside)}
            if part.is_scored_alone:
                shards += self._by_rows(part, rows_each)
            else:
                shards.append(part.work(part.passes * len(part.sample)))
        return shards

    def _by_rows(self, part: Part, rows_each: float) -> Iterator[ShardWork]:
        start, tokens = self._begun(part)
        if tokens is None:
            tokens = self._tokens(part)
        rows = len(part.sample)
        missing = missing_pieces(part.subject, self._store, start, rows, tokens)
        least = rows * len(self._parts) / MOST_SHARDS
        for first, end, count in _runs(missing, rows, max(rows_each, least)):
            yield part.work(count, (first, end), tokens)

    def _begun(self, part: Part) -> tuple[int, int | None]:
        """Return the number of first rows that are scored already, and of the tokens that the rest is scored with.

        The latter is None if it is still to be chosen. Both are as the pass itself will find them.
        """
        asked = part.method.asked_batch_tokens
        for end in reversed(block_ends(len(part.sample))):
            kept = self._store.about(part.subject.facts_of_scores(end))
            if kept is not None and asked in (None, kept.origin.batch_tokens):
                begun = kept.origin.batch_tokens
                return end, asked or (begun if begun in CANDIDATES[self._device] else None)
        return 0, asked

    def _tokens(self, part: Part) -> int:
        """Choose how many tokens a model's shards compute together, unless it is chosen: what suits a model like it."""
        address = part.scores.address
        if address not in self._batch_tokens:
            alike = (other for other in self._parts if NODE_FISHER in other.statistics and part.is_like(other))
            known = (self._batch_tokens.get(other.scores.address) for other in alike)
            self._batch_tokens[address] = next(filter(None, known), UNTRIED[self._device])
        return self._batch_tokens[address]


def _runs(missing: Sequence[int], rows: int, rows_each: float) -> Iterator[tuple[int, int, int]]:
    """Yield runs of missing pieces of about so many rows: the first, the one after the last, and the rows."""
    each = pieces(rows)
    run: list[int] = []
    held = 0.0
    for number in missing:
        if run and (number != run[-1] + 1 or held + each[number].rows / 2 > rows_each):
            yield run[0], run[-1] + 1, round(held)
            run, held = [], 0.0
        run.append(number)
        held += each[number].rows
    if run:
        yield run[0], run[-1] + 1, round(held)
