"""The interface of a statistic's pass over one model's rows: `Measurement` goes in, and `Measured` comes out."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from worker.engine.catalog.contracts.statistics import Facts, Origin
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import NODE_FISHER, MethodParameters
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.catalog.tasks import Task
from worker.engine.inputs.examples import Example
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.estimators import Estimator, estimator_for
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.scorer import Watching
from worker.engine.scoring.statistics import SUMS, NodeStatistics
from worker.engine.scoring.store import Statistics, StatisticsStore


@dataclass(frozen=True)
class Measured:
    """A model's statistics over its first `rows` rows. `cached`: all of them were found in the store."""

    rows: int = 0
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """Kept statistics, by name."""
    names: tuple[ScoreName, ...] = ()
    """Names of the scores of the model's mask nodes."""
    sums: Mapping[int, NodeStatistics] = field(default_factory=dict)
    """Sums of its first rows, from which scores follow, by the number of rows: at every look that is known."""
    estimator: str | None = None
    batch_tokens: int | None = None
    """Number of padded tokens that were computed together for the scores; None where it differs between parts."""
    cached: bool = False
    seconds: float = 0.0

    @property
    def scored_rows(self) -> int:
        """Number of first rows whose scores are known, with their sums."""
        return max(self.sums, default=0)

    def with_statistic(self, statistic: str, kept: Statistics) -> "Measured":
        return replace(self, statistics={**self.statistics, statistic: kept})

    def with_scores(self, rows: int, kept: Statistics) -> "Measured":
        """Add the scores of the first `rows` rows."""
        sums = {**self.sums, rows: NodeStatistics.from_named(rows, self.names, kept)}
        return replace(self.with_statistic(NODE_FISHER, kept), sums=sums)

    def of(self, statistic: str) -> Mapping[str, Tensor]:
        return self.statistics.get(statistic) or {}

    @property
    def scores(self) -> dict[ScoreName, Tensor]:
        """Scores of mask nodes, (nodes,), float64, by score name."""
        found = self.of(NODE_FISHER)
        return {name: found[name] for name in self.names} if found else {}

    @property
    def scores_and_errors(self) -> dict[str, Tensor]:
        """Return the scores, and the standard error of each under its name with `.stderr`."""
        return {name: of for name, of in self.of(NODE_FISHER).items() if not name.endswith(SUMS)}


@dataclass(frozen=True)
class Subject:
    """A model and its rows, as far as the facts of statistics go; its weights need not be loaded."""

    method: MethodParameters
    task: Task
    digest: str
    """Digest of the checkpoint."""
    sample: Sample
    precision: Precision

    @cached_property
    def estimator(self) -> Estimator | None:
        """The estimator of gradients, with `auto` resolved; None if the method takes no gradients."""
        asked = self.method.gradients
        return None if asked is None else estimator_for(asked.estimator, self.task, asked.seed)

    @property
    def required_estimator(self) -> Estimator:
        if self.estimator is None:
            raise TypeError(f"method {self.method.name} has no estimator to measure with")
        return self.estimator

    def facts(self, statistic: str, rows: int) -> Facts:
        """Return everything that a statistic of the first `rows` rows depends on, if it takes no gradients."""
        return Facts(
            statistic=statistic,
            checkpoint=self.digest,
            rows=self.sample.digest(rows, with_labels=False),
            tokens=self.sample.tokens,
            precision=self.precision,
        )

    def facts_of_gradients(self, statistic: str, rows: int) -> Facts:
        """Return everything that a statistic of the first `rows` rows depends on, if it is made of gradients."""
        estimator = self.required_estimator
        more = {
            "rows": self.sample.digest(rows, with_labels=self.method.needs_labels),
            "estimator": estimator.name,
            "seed": estimator.seed if estimator.name == "sampled" else None,
        }
        return self.facts(statistic, rows).model_copy(update=more)

    def facts_of_scores(self, rows: int) -> Facts:
        """Return everything that scores of mask nodes on the first `rows` rows depend on."""
        more = {"population": self.sample.population, "paper": self.method.batch_rows is not None}
        return self.facts_of_gradients(NODE_FISHER, rows).model_copy(update=more)


@dataclass(frozen=True)
class Measurement(Subject):
    """The task of measuring the first `rows` rows of one model for one method."""

    inputs: Sequence[LinearInput]
    """Inputs of the backbone's linear layers."""
    loaded: LoadedModel
    rows: int
    store: StatisticsStore
    batches: BatchSizes
    on_rows: OnRows
    """Called with the number of rows that were just computed."""
    on_kept: OnRows
    """Called with the number of rows that need not be, because what they give is kept."""
    batch_tokens: MutableMapping[str, int]
    """Numbers of tokens that the job computes together, by the address of a model's scores; chosen once a job."""
    beside: "Sequence[Beside]" = ()
    """Further statistics that are wanted of the same rows, and can share the passes that one of them runs."""

    @property
    def examples(self) -> list[Example]:
        return [example for block in self.sample.blocks(0, self.rows) for example in block]

    def origin(self, rows: int, batch_tokens: int | None = None) -> Origin:
        return Origin(
            checkpoint=self.loaded.info.source, dataset=self.sample.source, examples=rows, batch_tokens=batch_tokens
        )

    def find_or_compute(
        self, measured: Measured, facts: Facts, parts: Iterator[Mapping[str, Tensor]], passes: int = 1
    ) -> Measured:
        """Add a statistic of all rows to `measured`: the kept one, or else one from `parts`, held one at a time.

        Args:
            passes: number of times that `parts` go through the rows.
        """
        kept, was_there = self.store.get_or_compute(
            facts, self.origin(self.rows), parts, on_wait=lambda: self.on_rows(0)
        )
        if was_there:
            self.on_kept(self.rows * passes)
        return replace(measured.with_statistic(facts.statistic, kept), cached=measured.cached and was_there)


Beside = Callable[[Measurement], AbstractContextManager[Watching]]
"""Takes a statistic from forward passes over all rows that run while in context, and keeps it at the end."""


@dataclass(frozen=True)
class StatisticPass:
    """The functions that measure one statistic, in the module that has its name."""

    measure: Callable[[Measurement, Measured], Measured]
    """Adds the statistic to the measured ones; it goes on from those of fewer rows, if it can."""
    facts: Callable[[Subject, int], Facts]
    """Returns the facts of the statistic of so many first rows."""
    passes: Callable[[Sequence[LinearInput]], int] = lambda inputs: 1
    """Returns the number of passes over each row for a model whose linear layers have these inputs."""
    beside: Beside | None = None
    """Takes the statistic from another's passes, if it can be."""
