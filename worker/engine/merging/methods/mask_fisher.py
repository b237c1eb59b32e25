"""`mask_fisher`: slices weighted by the scores of the mask nodes that own them.

`w_j,s = lambda_j F'_j,s / sum_k lambda_k F'_k,s` with `F'` the score after normalisation and floor (Matena & Raffel
2022, arXiv 2111.09832, equation 5, over mask nodes instead of parameters: arXiv 2403.09891, section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from worker.engine.catalog.families import Owner, ScoreName, Slot
from worker.engine.catalog.methods import MaskFisherParameters, MethodParameters, Normalize, ScoringParameters
from worker.engine.catalog.primitives.values import TensorPlace
from worker.engine.merging.methods import paper
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_layer, by_slices, model_weights, normalized, of_slices

NodeScores = Mapping[ScoreName, Tensor]
NodeWeights = Callable[[ScoreName, TensorPlace], Tensor]
"""Gives merge weights of a score name's nodes in one tensor: (models, nodes), float64, summing to 1 over models."""


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskFisherParameters):
        raise TypeError(f"parameters of mask_fisher expected, got {type(parameters).__name__}")
    if parameters.preset == "paper":
        return paper.build(models)
    owned = node_weights(models, parameters)
    rest = rest_weights(models, parameters.rest)

    def prepare(versions: Versions) -> BlockMerge:
        owner = versions.slot.owner
        if owner is not None:
            return by_slices(versions, weights_of(owner, owned, versions.place), owner.axis)
        return by_slices(versions, rest(versions.slot, versions.place))

    return prepare


def weights_of(owner: Owner, owned: NodeWeights, place: TensorPlace) -> Tensor:
    """Return the merge weights of an owner's slices in one tensor, (models, slices)."""
    return of_slices(owner, [owned(score, place) for score in owner.scores])


def node_weights(models: list[MeasuredModel], parameters: ScoringParameters) -> NodeWeights:
    scores = [normalize_scores(model.scores, parameters.normalize) for model in models]

    def at(score: ScoreName, place: TensorPlace) -> Tensor:
        lambdas = model_weights(models, place)
        least = parameters.at("floor", place)
        of_models = [lam * floored(s[score], least) for lam, s in zip(lambdas, scores, strict=True)]
        return normalized(torch.stack(of_models), lambdas)

    return at


def weight_errors(weights: Tensor, relative: Tensor) -> Tensor:
    """Compute standard errors of merge weights whose models were measured on rows of their own.

    The delta method gives `se(w_j)^2 = w_j^2 [(1 - w_j)^2 rho_j^2 + sum_(k != j) w_k^2 rho_k^2]`, whatever the lambdas.

    Args:
        weights: (models, nodes), see `NodeWeights`.
        relative: `rho` of each model, (models, nodes), see `NodeStatistics.relative_errors`.

    Returns:
        Standard errors, (models, nodes).
    """
    variance = relative**2
    of_all = (weights**2 * variance).sum(0)
    return weights * (of_all + (1 - 2 * weights) * variance).clamp_min(0).sqrt()


def rest_weights(
    models: list[MeasuredModel], rest: Literal["uniform", "model"]
) -> Callable[[Slot, TensorPlace], Tensor]:
    """Return the merge weights of the rest, by the layer of a slot, and by place: (models, 1), float64.

    `uniform`: lambda alone. `model`: lambda times the sum over the kinds of the mean model-normalised score, of the
    layer, or, for tensors outside the layers, of the model.
    """
    by_model: list[dict[tuple[str, int | None], Tensor]] = []
    for model in models if rest == "model" else ():
        layers: dict[tuple[str, int | None], Tensor] = {}
        for (stack, layer, _), score in by_layer(normalize_scores(model.scores, "model")).items():
            layers[stack, layer] = layers.get((stack, layer), torch.zeros(1, dtype=torch.float64)) + score.mean()
        layers["", None] = torch.stack(list(layers.values())).mean(0)
        by_model.append(layers)

    def at(slot: Slot, place: TensorPlace) -> Tensor:
        lambdas = model_weights(models, place)
        if rest == "uniform":
            return (lambdas / lambdas.sum())[:, None]
        return normalized(
            torch.stack([lam * m[slot.stack, slot.layer] for lam, m in zip(lambdas, by_model, strict=True)]), lambdas
        )

    return at


def normalize_scores(scores: NodeScores, normalize: Normalize) -> dict[ScoreName, Tensor]:
    """Compute `F'` before the floor.

    With `layer`, a score is divided by its layer's mean for the kind; with `model`, by the L2 norm of its kind in the
    model. A mean or norm of 0 counts as 1.
    """
    if normalize == "none":
        return dict(scores)
    if normalize == "layer":
        return {site: score / _or_one(score.mean()) for site, score in scores.items()}
    norms = {
        kind: torch.cat([score for site, score in scores.items() if site.kind == kind]).norm()
        for kind in {site.kind for site in scores}
    }
    return {site: score / _or_one(norms[site.kind]) for site, score in scores.items()}


def floored(score: Tensor, floor: float) -> Tensor:
    """Raise the scores of a layer, (nodes,), to at least `floor` times their mean.

    A node that is dead in every model falls back to lambda; a layer that is dead in one model has no influence there.
    """
    return score.clamp_min(floor * float(score.mean()))


def weight_shares(weights: NodeWeights, owned: Mapping[ScoreName, Sequence[TensorPlace]]) -> list[float]:
    """Compute each model's mean merge weight over all nodes; a node's is its mean over the tensors with its slices.

    Args:
        owned: the places of these tensors by score name, see `MergePlan.owned`.
    """
    of_nodes = [torch.stack([weights(score, place) for place in places]).mean(0) for score, places in owned.items()]
    return torch.cat(of_nodes, dim=1).mean(1).tolist()


def _or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)
