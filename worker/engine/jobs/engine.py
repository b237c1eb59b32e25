"""The engine, which runs jobs and keeps the objects that outlive them."""

from collections.abc import Callable

import torch

from worker.engine.catalog.contracts.prediction import Prediction, PredictionSpec
from worker.engine.catalog.contracts.report import MergeResult, ScoreResult, ShardResult
from worker.engine.catalog.contracts.spec import MergeSpec, ScoreSpec, ShardSpec
from worker.engine.checkpoints.reader import Digests
from worker.engine.jobs.context import EngineState, job_context
from worker.engine.jobs.merge import merge
from worker.engine.jobs.predicting import predict
from worker.engine.jobs.score import score
from worker.engine.jobs.shard import measure_shard
from worker.engine.models.loading import ModelCache
from worker.engine.runtime.device import best_device
from worker.engine.runtime.progress import OnProgress
from worker.engine.scoring.batching import BatchSizes
from worker.engine.scoring.store import Common


class Engine:
    """Runs jobs one after the other, keeping models warm between them.

    Merging and scoring leave a complete artifact in the job's folder.

    Args:
        common: opens a tenant's statistics that machines have in common, for one job.

    Raises:
        EngineError: the job cannot be done; the message names the file, tensor or row. Any other exception is a fault
            of the engine.
    """

    def __init__(self, device: torch.device | None = None, common: Callable[[str], Common] | None = None) -> None:
        device = device or best_device()
        self._lasting = EngineState(device, ModelCache(device), BatchSizes(), Digests(), common)

    def run(self, spec: MergeSpec | ScoreSpec, on_progress: OnProgress) -> MergeResult | ScoreResult:
        """Run a job of either kind. Raises Cut when its scoring is left to shards."""
        return self.merge(spec, on_progress) if isinstance(spec, MergeSpec) else self.score(spec, on_progress)

    def merge(self, spec: MergeSpec, on_progress: OnProgress) -> MergeResult:
        """Run a whole merge."""
        with job_context(spec, self._lasting, on_progress) as context:
            return merge(spec, context)

    def score(self, spec: ScoreSpec, on_progress: OnProgress) -> ScoreResult:
        """Measure every model, and keep its statistics."""
        with job_context(spec, self._lasting, on_progress) as context:
            return score(spec, context)

    def shard(self, spec: ShardSpec, on_progress: OnProgress) -> ShardResult:
        """Measure a shard of a job's scoring, and keep what it finds."""
        with job_context(spec, self._lasting, on_progress) as context:
            return measure_shard(spec, context)

    def predict(self, spec: PredictionSpec, on_progress: OnProgress) -> Prediction:
        """Answer rows with a merge that was published, one of its experts and the plain average."""
        with job_context(spec, self._lasting, on_progress) as context:
            return predict(spec, context)
