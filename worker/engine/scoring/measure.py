"""Measures the statistics that a method needs of one model: they come from the store, or are computed and kept."""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measurement import Measured, Measurement
from worker.engine.scoring.passes import PASSES
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore

__all__ = ["Measured", "Measurer"]


class Measurer:
    """Measures models for one method.

    Args:
        inputs: inputs of the backbone's linear layers.
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
        self._inputs = inputs
        self._precision = precision
        self._store = store
        self._batches = batches

    def passes(self, given: Collection[str]) -> int:
        """Return the number of passes over each row of a model of which files have the statistics `given`."""
        return sum(PASSES[statistic].passes(self._inputs) for statistic in self._method.statistics - {*given})

    def measure(
        self,
        measured: Measured,
        loaded: LoadedModel,
        digest: str,
        sample: Sample,
        rows: int,
        on_rows: OnRows,
        statistics: Collection[str] | None = None,
        also: Collection[str] = (),
    ) -> Measured:
        """Add statistics of the first `rows` rows to `measured`: all of the method's, or those that are named.

        Scores of mask nodes go on from the known sums over fewer rows. `digest` is the checkpoint's.

        Args:
            also: statistics of the same rows that others need. They are kept too if they take no pass of their own.

        Raises:
            NumericalError: a gradient or an activation is NaN or infinite; the message names the row.
        """
        start = time.monotonic()
        wanted = self._method.statistics if statistics is None else statistics
        beside = {name: PASSES[name].beside for name in sorted({*wanted, *also})}
        work = Measurement(
            self._method,
            self._inputs,
            loaded,
            digest,
            sample,
            rows,
            self._precision,
            self._store,
            self._batches,
            on_rows,
            [begin for begin in beside.values() if begin is not None],
        )
        found = replace(
            measured,
            cached=measured.cached or not measured.statistics,
            estimator=work.estimator.name if work.estimator else None,
        )
        for statistic in sorted(wanted, key=lambda name: (beside[name] is not None, name)):  # these find what they need
            found = PASSES[statistic].measure(work, found)
        return replace(found, rows=rows, seconds=found.seconds + time.monotonic() - start)
