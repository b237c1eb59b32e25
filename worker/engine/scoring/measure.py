"""What a method needs to know of one model: from the store where it was measured before, or computed and kept."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from worker.engine.catalog.contracts.statistics import Facts, Origin
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import MethodParameters, Statistic
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.inputs.examples import Example, plan_batches
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision, rounded_weights
from worker.engine.scoring.batching import CANDIDATES, BatchSizes
from worker.engine.scoring.estimators import Estimator, Sampled, estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.grams import grams, in_passes
from worker.engine.scoring.sample import Sample, block_ends, looks
from worker.engine.scoring.scorer import OnRows, paper_scores, score, score_names
from worker.engine.scoring.statistics import STANDARD_ERROR, SUMS, NodeStatistics
from worker.engine.scoring.store import Statistics, StatisticsStore


@dataclass
class Measured:
    """A model's statistics, of its first `rows` rows. `cached` when all of them were found."""

    rows: int = 0
    statistics: dict[Statistic, Statistics] = field(default_factory=dict)
    names: tuple[ScoreName, ...] = ()
    """Names of the scores of the model's mask nodes."""
    sums: dict[int, NodeStatistics] = field(default_factory=dict)
    """What the scores of its first rows follow from, by how many these are: at every look that is known."""
    estimator: str | None = None
    batch_tokens: int | None = None
    """Padded tokens that were computed together for the scores; None where parts were computed by different numbers."""
    cached: bool = False
    seconds: float = 0.0

    def of(self, statistic: Statistic) -> Mapping[str, Tensor]:
        return self.statistics.get(statistic) or {}

    @property
    def scores(self) -> dict[ScoreName, Tensor]:
        """Of mask nodes: (nodes,), float64, by score name."""
        found = self.of(Statistic.MASK_FISHER)
        return {name: found[name] for name in self.names} if found else {}

    @property
    def scores_and_errors(self) -> dict[str, Tensor]:
        """Scores, and each one's standard error under its name and `.stderr`."""
        return {name: of for name, of in self.of(Statistic.MASK_FISHER).items() if not name.endswith(SUMS)}


class Measurer:
    """Measures models for one method.

    Args:
        inputs: of the backbone's linear layers.
        batches: knows how many tokens are best computed together.
    """

    def __init__(
        self,
        method: MethodParameters,
        inputs: Sequence[LinearInput],
        precision: Precision,
        store: StatisticsStore,
        batches: BatchSizes,
    ) -> None:
        self._method = method
        self._passes = in_passes(inputs)
        self._precision = precision
        self._store = store
        self._batches = batches

    @property
    def passes(self) -> int:
        """How often each row is gone through."""
        return sum(self._passes_of(statistic) for statistic in self._method.statistics)

    def measure(
        self,
        measured: Measured,
        loaded: LoadedModel,
        digest: str,
        sample: Sample,
        rows: int,
        on_rows: OnRows,
        statistics: Collection[Statistic] | None = None,
    ) -> None:
        """Add statistics of the first `rows` rows to `measured`: all of the method's, or those that are named.

        Mask scores go on from what is known of fewer rows. `digest` is the checkpoint's.

        Raises:
            NumericalError: a gradient or an activation is NaN or infinite; names the row.
        """
        start = time.monotonic()
        measured.cached = measured.cached or not measured.statistics
        measured.names = tuple(sorted(score_names(loaded)))
        estimator = self._estimator(loaded)
        measured.estimator = estimator.name if estimator else None
        for statistic in sorted(self._method.statistics if statistics is None else statistics):
            if statistic is Statistic.MASK_FISHER and estimator is not None and not self._is_paper:
                self._score(measured, loaded, digest, sample, rows, estimator, on_rows)
                continue
            kept, was_there = self._store.get_or_compute(
                self._facts(statistic, estimator, digest, sample, rows),
                _origin(loaded, sample, rows),
                self._computed(statistic, estimator, loaded, sample, rows, on_rows),
                on_wait=lambda: on_rows(0),
            )
            if was_there:
                on_rows(rows * self._passes_of(statistic))
            measured.cached &= was_there
            measured.statistics[statistic] = kept
        measured.rows = rows
        measured.seconds += time.monotonic() - start

    def _score(
        self,
        measured: Measured,
        loaded: LoadedModel,
        digest: str,
        sample: Sample,
        rows: int,
        estimator: Estimator,
        on_rows: OnRows,
    ) -> None:
        """Scores of the first `rows`, from the longest run of whole blocks whose sums are known; every look is kept.

        Of several processes that want the same, one goes through the rows; the others wait for it.
        """

        def facts(end: int) -> Facts:
            return self._facts(Statistic.MASK_FISHER, estimator, digest, sample, end)

        counted = max(measured.sums, default=0)
        known = self._find(measured, facts, rows)
        if known == rows:
            on_rows(known - counted)
            return
        # Weights are rounded here once, and not anew for every block.
        with self._store.alone_with(facts(rows), lambda: on_rows(0)), rounded_weights(loaded.model, self._precision):
            known = self._find(measured, facts, rows)
            on_rows(known - counted)
            sums = NodeStatistics()
            tokens = 0
            if known:
                sums.merge(measured.sums[known])
            for look in [look for look in looks(rows) if look > known]:
                measured.cached = False
                for block in sample.blocks(sums.examples, look):
                    if not tokens:
                        tokens = self._tokens(measured, loaded, block, rows - known, estimator, sample, on_rows)
                        measured.batch_tokens = tokens if measured.batch_tokens == tokens or not known else None
                    batches = plan_batches(block, tokens)
                    sums.merge(score(loaded, block, estimator, self._precision, sample.source, on_rows, batches))
                errors = sums.standard_errors(sample.population)
                named = {f"{site}{STANDARD_ERROR}": error for site, error in errors.items()}
                parts = [sums.scores() | named | sums.named()]
                origin = _origin(loaded, sample, look, measured.batch_tokens)
                kept = self._store.put(facts(look), origin, parts)
                measured.sums[look] = NodeStatistics.from_named(look, measured.names, kept)
                measured.statistics[Statistic.MASK_FISHER] = kept

    def _find(self, measured: Measured, facts: Callable[[int], Facts], rows: int) -> int:
        """Add the longest run of whole blocks that is kept, and the looks before it; how many rows are known then.

        Where the method names the tokens of a batch, only what was computed by so many counts as kept.
        """
        known = max(measured.sums, default=0)
        asked = self._asked_tokens
        for end in reversed([end for end in block_ends(rows) if end > known]):
            kept = self._store.get(facts(end))
            if kept is not None and asked in (None, kept.about.origin.batch_tokens):
                measured.sums[end] = NodeStatistics.from_named(end, measured.names, kept)
                measured.statistics[Statistic.MASK_FISHER] = kept
                measured.batch_tokens = kept.about.origin.batch_tokens
                known = end
                break
        for look in [look for look in looks(known) if look > 0 and look not in measured.sums]:
            kept = self._store.get(facts(look))
            if kept is not None:
                measured.sums[look] = NodeStatistics.from_named(look, measured.names, kept)
        return known

    @property
    def _asked_tokens(self) -> int | None:
        """Of a batch, where the method names their number."""
        return self._method.asked_batch_tokens

    def _tokens(
        self,
        measured: Measured,
        loaded: LoadedModel,
        block: Sequence[Example],
        rows: int,
        estimator: Estimator,
        sample: Sample,
        on_rows: OnRows,
    ) -> int:
        """That are computed together, with padding, of `rows` rows like those of the block.

        What was begun goes on by the same number, if that is none that only another device can hold.
        """
        if self._asked_tokens is not None:
            return self._asked_tokens
        if measured.batch_tokens in CANDIDATES[loaded.device.type]:
            return measured.batch_tokens
        return self._batches.find(loaded, block, rows, estimator, self._precision, sample.source, on_rows)

    def _passes_of(self, statistic: Statistic) -> int:
        return len(self._passes) if statistic is Statistic.GRAM else 1

    def _estimator(self, loaded: LoadedModel) -> Estimator | None:
        """Which label gradients are of, with `auto` resolved; None where there are none."""
        asked = self._method.gradients
        return None if asked is None else estimator_for(asked.estimator, loaded.task, asked.seed)

    def _facts(
        self, statistic: Statistic, estimator: Estimator | None, digest: str, sample: Sample, rows: int
    ) -> Facts:
        """All that the statistic of the first `rows` follows from."""
        if statistic is Statistic.GRAM:
            estimator = None
        of_nodes = statistic is Statistic.MASK_FISHER
        return Facts(
            statistic=statistic,
            checkpoint=digest,
            rows=sample.digest(rows, with_labels=estimator is not None and self._method.needs_labels),
            tokens=sample.tokens,
            precision=self._precision,
            estimator=estimator.name if estimator else None,
            seed=estimator.seed if isinstance(estimator, Sampled) else None,
            population=sample.population if of_nodes else None,
            paper=self._is_paper if of_nodes else None,
        )

    @property
    def _is_paper(self) -> bool:
        return self._method.batch_rows is not None

    def _computed(
        self,
        statistic: Statistic,
        estimator: Estimator | None,
        loaded: LoadedModel,
        sample: Sample,
        rows: int,
        on_rows: OnRows,
    ) -> Iterator[Mapping[str, Tensor]]:
        """The statistic in parts, no more than one of which is held."""
        examples = [example for block in sample.blocks(0, rows) for example in block]
        if statistic is Statistic.GRAM:
            for inputs in self._passes:
                yield grams(loaded, inputs, examples, self._precision, sample.source, on_rows)
        elif estimator is None:
            raise TypeError(f"method {self._method.name} has no estimator to measure {statistic} with")
        elif statistic is Statistic.FISHER:
            yield fisher(loaded, examples, estimator, self._precision, sample.source, on_rows)
        else:
            yield {str(n): of for n, of in paper_scores(loaded, examples, sample.source, on_rows).items()}


def _origin(loaded: LoadedModel, sample: Sample, rows: int, batch_tokens: int | None = None) -> Origin:
    return Origin(checkpoint=loaded.info.source, dataset=sample.source, examples=rows, batch_tokens=batch_tokens)
