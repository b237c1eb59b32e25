"""The context of a job's steps: models, statistics and inputs, and the place for notes, progress and times."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.views import Views
from worker.engine.catalog.contracts.report import Timings
from worker.engine.catalog.contracts.spec import JobSpec, SharedScoring, StoreSpec
from worker.engine.catalog.planning.holding import Holding
from worker.engine.catalog.primitives.notes import in_order
from worker.engine.checkpoints.reader import Digests, TensorReader
from worker.engine.evaluation.outputs import KeptOutputs
from worker.engine.models.loading import ModelCache
from worker.engine.runtime import rendering
from worker.engine.runtime.device import Precision, has_bfloat16, reset_peak_memory, resolve_precision
from worker.engine.runtime.progress import OnProgress, Phase
from worker.engine.runtime.resources import megabytes
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.store import Common, StatisticsStore

HELD = {
    Holding.STORED: "they were held in the format of their files, and converted layer by layer",
    Holding.STREAMED: "layers were read from the files while they were at work, which takes longer",
}

SLOW_BFLOAT16 = (
    "precision bfloat16 was asked for, and this device has no instructions for it: measuring takes up to a hundred "
    "times as long as with float32; 'auto' takes bfloat16 only where it is faster"
)


@dataclass(frozen=True)
class EngineState:
    """Objects that outlive jobs: models, batch sizes and digests that the next job need not find out anew."""

    device: torch.device
    models: ModelCache
    batches: BatchSizes
    digests: Digests
    common: Callable[[str], Common] | None = None
    """Opens a tenant's statistics that machines have in common, for one job; None where they have none."""


@dataclass(frozen=True)
class JobContext:
    """One job's context. Steps are functions of values; their notes, progress and times go here."""

    lasting: EngineState
    precision: Precision
    store: StatisticsStore
    views: Views
    reader: TensorReader
    """Reads statistics that come from files."""
    on_progress: OnProgress
    shard_seconds: float | None = None
    """Seconds of scoring in a shard; None: this job's scoring is not cut."""
    shared: SharedScoring = field(default_factory=SharedScoring)
    batch_tokens: dict[str, int] = field(default_factory=dict)
    """Numbers of padded tokens that the job computes together, by the address of a model's scores."""
    _notes: list[str] = field(default_factory=list)
    _of_memory: list[str] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.lasting.device

    @property
    def models(self) -> ModelCache:
        return self.lasting.models

    @property
    def outputs(self) -> KeptOutputs:
        """Outputs of models on rows, kept beside the statistics."""
        return KeptOutputs(self.store, self.precision)

    def hold(self, holding: Holding, infos: Sequence[CheckpointInfo], needed_bytes: int, available_bytes: int) -> None:
        """Hold the job's models in this way from now on, or in one that takes less memory if that was needed before.

        Args:
            infos: the checkpoints whose models this is asked for.
            needed_bytes: memory that the job would need if its models were held whole, for the note.
        """
        if holding <= self.models.holding:
            return
        self.models.hold(holding, infos)
        lacking = f"needs {megabytes(needed_bytes)}, and this worker has {megabytes(available_bytes)}"
        self._of_memory[:] = [f"holding models in float32 {lacking}: {HELD[holding]}; no number depends on it"]

    def note(self, *notes: str) -> None:
        """Add notes for the reader of the result."""
        self._notes.extend(notes)

    def note_first(self, *notes: str) -> None:
        """Add notes for the reader of the result before all that were added so far."""
        self._notes[:0] = notes

    @property
    def notes(self) -> list[str]:
        """All notes, with doubts first."""
        return in_order([*self._of_memory, *self._notes])

    def phase(self, name: str, total: int, unit: str) -> Phase:
        """Begin a phase of the job's progress."""
        return Phase(name, total, unit, self.on_progress)

    def phase_of_models(self, name: str, totals: Mapping[str, int], unit: str) -> Phase:
        """Begin a phase that goes through the models one by one. `totals` has the number of units of each."""
        return Phase(name, sum(totals.values()), unit, self.on_progress, totals)

    @contextmanager
    def timed(self, name: str, before: float = 0.0) -> Iterator[None]:
        """Take the time of a step for the field `name` of `Timings`; `before` is what it took in other processes."""
        start = time.monotonic()
        yield
        self._seconds[name] = round(before + time.monotonic() - start, 3)

    @property
    def timings(self) -> Timings:
        return Timings(**self._seconds)


@contextmanager
def job_context(spec: JobSpec, lasting: EngineState, on_progress: OnProgress) -> Iterator[JobContext]:
    """Begin a job: its folder, views of its inputs, and its statistics.

    Statistics without a store are kept until the job is done, so that several candidates of one job share them.
    """
    reset_peak_memory()
    spec.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(rendering.end)
        lasting.models.holding = Holding.WHOLE
        where = spec.store
        if where is None:
            where = StoreSpec(folder=Path(stack.enter_context(TemporaryDirectory())), max_bytes=sys.maxsize)
        common = None if spec.store is None or lasting.common is None else lasting.common(where.tenant)
        views = stack.enter_context(Views())
        store = stack.enter_context(StatisticsStore(where.folder, where.max_bytes, where.others, common))
        reader = stack.enter_context(TensorReader())
        precision = resolve_precision(spec.method.precision, lasting.device)
        tokens = dict(spec.shared.batch_tokens)
        seconds = None if spec.store is None else spec.shard_seconds
        context = JobContext(lasting, precision, store, views, reader, on_progress, seconds, spec.shared, tokens)
        if precision == "bfloat16" and not has_bfloat16(lasting.device):
            context.note(SLOW_BFLOAT16)
        yield context
