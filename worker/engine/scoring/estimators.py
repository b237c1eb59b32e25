"""Estimators: each example's expected squared gradient over labels, as squares of a few derivatives.

The kind of head says which derivatives these are, see `HeadKind`.
"""

from dataclasses import dataclass

from torch import Tensor

from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.tasks import Task
from worker.engine.inputs.examples import Batch
from worker.engine.models.loading import LoadedModel
from worker.engine.models.mask_gradients import MaskGradients
from worker.engine.tasks import EstimatorName, kind_of
from worker.engine.tasks.kind import Passes, ResolvedEstimator

Squares = dict[ScoreName, Tensor]
"""Values by score name, (batch, nodes), float64."""


@dataclass(frozen=True)
class Estimator:
    """An expectation over labels: of the model's own, of one that is drawn from it, or of the row's own label."""

    name: ResolvedEstimator
    seed: int = 0
    """Seed of the drawn labels."""

    def passes(self, loaded: LoadedModel, outputs: Tensor, batch: Batch) -> Passes:
        """Choose what to differentiate, by the outputs of a forward pass, see `HeadKind.run`."""
        kind = loaded.kind
        match self.name:
            case "expected":
                return kind.expected(outputs, batch)
            case "sampled":
                return kind.sampled(outputs, batch, self.seed)
            case "empirical":
                if batch.labels is None:
                    raise RuntimeError("the empirical estimator needs labels; planning should have refused this")
                return kind.empirical(outputs, batch, batch.labels)


def expected_squares(passes: Passes, gradients: MaskGradients, batch: Batch) -> Squares:
    """Compute each example's expected squared gradient by every mask node."""
    weights, sums = passes
    total: Squares = {}
    for k in range(weights.shape[1]):
        for site, g in gradients.of(sums[k], last=k == weights.shape[1] - 1).items():
            square = batch.by_row(g).square().mul_(weights[:, k, None])
            total[site] = total[site] + square if site in total else square
    return total


def estimator_for(name: EstimatorName, task: Task, seed: int) -> Estimator:
    """Make the estimator for a head; `auto` is resolved."""
    return Estimator(kind_of(task).estimator(name), seed)
