"""Tells how well the merge weights are known from the rows that were scored, and whether that is enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worker.engine.catalog.contracts.report import Stopping, StoppingPoint
from worker.engine.catalog.families import ScoreName
from worker.engine.catalog.methods import ScoringParameters
from worker.engine.catalog.primitives.values import PerTensor, TensorPlace
from worker.engine.merging.methods import MeasuredModel
from worker.engine.merging.methods.mask_fisher import node_weights, weight_errors
from worker.engine.scoring.statistics import NodeStatistics

Owned = Mapping[ScoreName, Sequence[TensorPlace]]
"""Places of tensors by score name, see `MergePlan.owned`."""

LEAST_ROWS = 2  # one has no standard error


@dataclass(frozen=True)
class Scored:
    """A model with `weight` lambda, scored on some of `population` rows; its sums are by the number of rows in them."""

    weight: PerTensor[float]
    sums: Mapping[int, NodeStatistics]
    population: int

    def at(self, rows: int) -> NodeStatistics | None:
        """Return the sums over `rows` rows, or over all where there are no more."""
        return self.sums.get(min(rows, max(self.sums)))


def errors_at(
    method: ScoringParameters, models: Sequence[Scored], rows: int, owned: Owned
) -> dict[ScoreName, Tensor] | None:
    """Compute standard errors of the merge weights after `rows` rows of each model: by score name, (models, nodes).

    For a node whose weights differ between tensors, it is the root mean square over the tensors that it owns slices of.
    A single model is compared with one that has the same scores and errors, so that `se = rho / sqrt(8)`. None where
    the sums are not known, or are those of one row.
    """
    found = []
    for model in models if len(models) > 1 else [*models, *models]:
        sums = model.at(rows)
        if sums is None or sums.examples < min(LEAST_ROWS, model.population):
            return None
        found.append((model, sums))
    weights = node_weights([MeasuredModel(m.weight, sums.scores()) for m, sums in found], method)

    @cache
    def relative(floor: float) -> list[dict[ScoreName, Tensor]]:
        return [sums.relative_errors(m.population, method.normalize, floor) for m, sums in found]

    def errors(score: ScoreName, place: TensorPlace) -> Tensor:
        of_models = relative(method.at("floor", place))
        return weight_errors(weights(score, place), torch.stack([rho[score] for rho in of_models]))

    return {
        score: torch.stack([errors(score, place) ** 2 for place in places]).mean(0).sqrt()
        for score, places in owned.items()
    }


def point(method: ScoringParameters, models: Sequence[Scored], rows: int, owned: Owned) -> StoppingPoint | None:
    """Compute the error curve's point after `rows` rows of each model; the largest of the models' errors counts."""
    errors = errors_at(method, models, rows, owned)
    if errors is None:
        return None
    by_name = {site: float((of_models**2).mean(1).max().sqrt()) for site, of_models in errors.items()}
    return StoppingPoint(
        examples=max(min(rows, max(model.sums)) for model in models), error=max(by_name.values()), errors=by_name
    )


def stopping(method: ScoringParameters, models: Sequence[Scored], owned: Owned) -> Stopping:
    """Compute the whole curve, as far as it is known."""
    looked_at = sorted({rows for model in models for rows in model.sums})
    curve = [found for rows in looked_at if (found := point(method, models, rows, owned)) is not None]
    reached = None if method.tolerance is None else bool(curve) and curve[-1].error <= method.tolerance
    return Stopping(tolerance=method.tolerance, reached=reached, curve=curve)


def errors_of_models(method: ScoringParameters, models: Sequence[Scored], owned: Owned) -> list[float | None]:
    """Compute, for every model, the root mean square over all nodes of its merge weights' standard error."""
    errors = errors_at(method, models, max(max(model.sums) for model in models), owned)
    if errors is None:
        return [None] * len(models)
    of_models = torch.cat(list(errors.values()), dim=1)[: len(models)]
    return (of_models**2).mean(1).sqrt().tolist()
