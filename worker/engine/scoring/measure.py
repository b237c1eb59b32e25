"""Measures the statistics that a method needs of one model: they come from the store, or are computed and kept."""

import time
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import replace

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.plan import LinearInput
from worker.engine.models.loading import LoadedModel
from worker.engine.runtime.device import Precision
from worker.engine.runtime.progress import OnRows
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.measurement import Beside, Measured, Measurement
from worker.engine.scoring.passes import PASSES
from worker.engine.scoring.pieces import measure_pieces
from worker.engine.scoring.sample import Sample
from worker.engine.scoring.store import StatisticsStore

__all__ = ["Measured", "Measurer"]


class Measurer:
    """Measures models for one method.

    Args:
        inputs: inputs of the backbone's linear layers.
        batches: knows how many tokens are best computed together.
        batch_tokens: numbers that the job has chosen already, see `Measurement`.
    """

    def __init__(
        self,
        method: MethodParameters,
        inputs: Sequence[LinearInput],
        precision: Precision,
        store: StatisticsStore,
        batches: BatchSizes,
        batch_tokens: MutableMapping[str, int] | None = None,
    ) -> None:
        self._method = method
        self._inputs = inputs
        self._precision = precision
        self._store = store
        self._batches = batches
        self._batch_tokens: MutableMapping[str, int] = {} if batch_tokens is None else batch_tokens

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
        on_kept: OnRows | None = None,
    ) -> Measured:
        """Add statistics of the first `rows` rows to `measured`: all of the method's, or those that are named.

        Scores of mask nodes go on from the known sums over fewer rows. `digest` is the checkpoint's.

        Args:
            also: statistics of the same rows that others need. They are kept too if they take no pass of their own.
            on_kept: called with numbers of rows that are kept already; `on_rows` by default.

        Raises:
            NumericalError: a gradient or an activation is NaN or infinite; the message names the row.
        """
        start = time.monotonic()
        wanted = self._method.statistics if statistics is None else statistics
        beside = {name: PASSES[name].beside for name in sorted({*wanted, *also})}
        begins = [begin for begin in beside.values() if begin is not None]
        work = self._work(loaded, digest, sample, rows, on_rows, on_kept or on_rows, begins)
        found = replace(
            measured,
            cached=measured.cached or not measured.statistics,
            estimator=work.estimator.name if work.estimator else None,
        )
        for statistic in sorted(wanted, key=lambda name: (beside[name] is not None, name)):  # these find what they need
            found = PASSES[statistic].measure(work, found)
        return replace(found, rows=rows, seconds=found.seconds + time.monotonic() - start)

    def measure_pieces(
        self, loaded: LoadedModel, digest: str, sample: Sample, first: int, end: int, tokens: int, on_rows: OnRows
    ) -> None:
        """Keep the sums of a run of pieces, which the scores of all rows of the sample are made of later."""
        measure_pieces(self._work(loaded, digest, sample, len(sample), on_rows, on_rows), first, end, tokens)

    def _work(
        self,
        loaded: LoadedModel,
        digest: str,
        sample: Sample,
        rows: int,
        on_rows: OnRows,
        on_kept: OnRows,
        beside: Sequence[Beside] = (),
    ) -> Measurement:
        return Measurement(
            self._method,
            loaded.task,
            digest,
            sample,
            self._precision,
            inputs=self._inputs,
            loaded=loaded,
            rows=rows,
            store=self._store,
            batches=self._batches,
            on_rows=on_rows,
            on_kept=on_kept,
            batch_tokens=self._batch_tokens,
            beside=beside,
        )
