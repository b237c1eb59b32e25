"""What a method needs to know of one model: from the store where it was measured before, or computed and kept."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from worker.engine.catalog.methods import (
    GradientParameters,
    MaskFisherParameters,
    MeasuringParameters,
    Statistic,
)
from worker.engine.catalog.planning import LinearInput
from worker.engine.catalog.statistics import Facts, Origin
from worker.engine.checkpoints.loading import LoadedModel
from worker.engine.device import Precision
from worker.engine.scoring.data import Example
from worker.engine.scoring.estimators import Estimator, Sampled, estimator_for
from worker.engine.scoring.fisher import fisher
from worker.engine.scoring.grams import grams, in_passes
from worker.engine.scoring.scorer import OnRows, paper_scores, score
from worker.engine.store import Statistics, StatisticsStore

STANDARD_ERROR = ".stderr"


@dataclass(frozen=True)
class Sample:
    """Rows of one model to measure it on, of `population` in the data set `source`."""

    examples: Sequence[Example]
    population: int
    source: str


@dataclass
class Measured:
    """A model's statistics. `cached` when all of them were found."""

    statistics: dict[Statistic, Statistics] = field(default_factory=dict)
    estimator: str | None = None
    cached: bool = False
    seconds: float = 0.0

    def of(self, statistic: Statistic) -> Mapping[str, Tensor]:
        return self.statistics.get(statistic) or {}

    @property
    def scores(self) -> dict[str, Tensor]:
        """Of mask nodes: (nodes,), float64, by score name."""
        return {k: v for k, v in self.of(Statistic.MASK_FISHER).items() if not k.endswith(STANDARD_ERROR)}


class Measurer:
    """Measures models for one method.

    Args:
        inputs: of the backbone's linear layers.
    """

    def __init__(
        self,
        method: MeasuringParameters,
        inputs: Sequence[LinearInput],
        precision: Precision,
        store: StatisticsStore,
    ) -> None:
        self._method = method
        self._passes = in_passes(inputs)
        self._precision = precision
        self._store = store

    @property
    def passes(self) -> int:
        """How often each row is gone through."""
        return sum(self._passes_of(statistic) for statistic in self._method.statistics)

    def measure(self, loaded: LoadedModel, digest: str, sample: Sample, on_rows: OnRows) -> Measured:
        """All of the method's statistics of one model; `digest` is the checkpoint's.

        Raises:
            NumericalError: a gradient or an activation is NaN or infinite; names the row.
        """
        start = time.monotonic()
        estimator = self._estimator(loaded)
        measured = Measured(estimator=estimator.name if estimator else None, cached=True)
        for statistic in sorted(self._method.statistics):
            kept, was_there = self._store.get_or_compute(
                self._facts(statistic, loaded, digest, sample),
                Origin(checkpoint=loaded.info.source, dataset=sample.source, examples=len(sample.examples)),
                self._computed(statistic, loaded, sample, on_rows),
                on_wait=lambda: on_rows(0),
            )
            if was_there:
                on_rows(len(sample.examples) * self._passes_of(statistic))
            measured.cached &= was_there
            measured.statistics[statistic] = kept
        measured.seconds = time.monotonic() - start
        return measured

    def _passes_of(self, statistic: Statistic) -> int:
        return len(self._passes) if statistic is Statistic.GRAM else 1

    def _estimator(self, loaded: LoadedModel) -> Estimator | None:
        """Which label gradients are of, with `auto` resolved; None where there are none."""
        if isinstance(self._method, GradientParameters):
            return estimator_for(self._method.estimator, loaded.task, self._method.seed)
        return None

    def _facts(self, statistic: Statistic, loaded: LoadedModel, digest: str, sample: Sample) -> Facts:
        """All that the statistic follows from. Tokenizer and `max_length` show in the rows."""
        of_nodes = statistic is Statistic.MASK_FISHER
        estimator = None if statistic is Statistic.GRAM else self._estimator(loaded)
        return Facts(
            statistic=statistic,
            checkpoint=digest,
            rows=_digest_rows(sample.examples, with_labels=estimator is not None and self._method.needs_labels),
            precision=self._precision,
            estimator=estimator.name if estimator else None,
            seed=estimator.seed if isinstance(estimator, Sampled) else None,
            population=sample.population if of_nodes else None,
            paper=self._is_paper if of_nodes else None,
        )

    @property
    def _is_paper(self) -> bool:
        return isinstance(self._method, MaskFisherParameters) and self._method.preset == "paper"

    def _computed(
        self, statistic: Statistic, loaded: LoadedModel, sample: Sample, on_rows: OnRows
    ) -> Iterator[Mapping[str, Tensor]]:
        """The statistic in parts, no more than one of which is held."""
        examples, source = sample.examples, sample.source
        estimator = self._estimator(loaded)
        if statistic is Statistic.GRAM:
            for inputs in self._passes:
                yield grams(loaded, inputs, examples, self._precision, source, on_rows)
        elif estimator is None:
            raise TypeError(f"method {self._method.name} has no estimator to measure {statistic} with")
        elif statistic is Statistic.FISHER:
            yield fisher(loaded, examples, estimator, self._precision, source, on_rows)
        elif self._is_paper:
            yield paper_scores(loaded, examples, source, on_rows)
        else:
            sums = score(loaded, examples, estimator, self._precision, source, on_rows)
            errors = sums.standard_errors(sample.population)
            yield sums.scores() | {f"{site}{STANDARD_ERROR}": error for site, error in errors.items()}


def _digest_rows(examples: Sequence[Example], *, with_labels: bool) -> str:
    """sha256 over the rows' tokens, in order, and over their labels where these are read."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.encoding, example.label if with_labels else None]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
