"""`mask_fisher`: slices weighted by the scores of the mask nodes that own them.

`w_j,s = lambda_j F'_j,s / sum_k lambda_k F'_k,s` with `F'` the score after normalisation and floor (Matena & Raffel
2022, arXiv 2111.09832, equation 5, over mask nodes instead of parameters: arXiv 2403.09891, section 3).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from worker.engine.catalog.families import Nodes
from worker.engine.catalog.methods import MaskFisherParameters, MethodParameters, Normalize
from worker.engine.methods import paper
from worker.engine.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.methods.combine import EVERYWHERE, by_slices, model_weights, normalized

Scores = Mapping[str, Tensor]


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskFisherParameters):
        raise TypeError(f"parameters of mask_fisher expected, got {type(parameters).__name__}")
    if parameters.preset == "paper":
        return paper.build(models)
    owned = node_weights(models, parameters.normalize, parameters.floor)
    rest = rest_weights(models, parameters.rest)

    def prepare(versions: Versions) -> BlockMerge:
        owner = versions.slot.owner
        if owner is not None:
            return by_slices(versions, owned[owner.score], owner.axis)
        return by_slices(versions, rest.get(versions.slot.layer, rest[None]))

    return prepare


def node_weights(models: list[MeasuredModel], normalize: Normalize, floor: float) -> dict[str, Tensor]:
    """Merge weights of every node: by score name, (models, nodes), float64, summing to 1 over models."""
    lambdas = model_weights(models, EVERYWHERE)
    scores = [floored(normalize_scores(model.scores, normalize), floor) for model in models]
    return {
        site: normalized(torch.stack([lam * s[site] for lam, s in zip(lambdas, scores, strict=True)]), lambdas)
        for site in scores[0]
    }


def weight_errors(weights: Mapping[str, Tensor], relative: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Standard errors of merge weights whose models were measured on rows of their own.

    By the delta method `se(w_j)^2 = w_j^2 [(1 - w_j)^2 rho_j^2 + sum_(k != j) w_k^2 rho_k^2]`, whatever the lambdas.

    Args:
        weights: of every node, see `node_weights`.
        relative: `rho` of each model, (nodes,) by score name, see `NodeStatistics.relative_errors`.

    Returns:
        By score name, (models, nodes).
    """
    found = {}
    for site, w in weights.items():
        variance = torch.stack([rho[site] for rho in relative]) ** 2
        of_all = (w**2 * variance).sum(0)
        found[site] = w * (of_all + (1 - 2 * w) * variance).clamp_min(0).sqrt()
    return found


def rest_weights(models: list[MeasuredModel], rest: Literal["uniform", "model"]) -> dict[int | None, Tensor]:
    """Merge weights of what no node owns: by layer, and None for outside the layers; (models, 1), float64.

    `uniform`: lambda alone. `model`: lambda times the sum over both kinds of the mean model-normalised score, of the
    layer, or for what lies outside the layers of the model.
    """
    lambdas = model_weights(models, EVERYWHERE)
    if rest == "uniform":
        return {None: (lambdas / lambdas.sum())[:, None]}
    by_model = []
    for model in models:
        layers: dict[int | None, Tensor] = {}
        for site, score in normalize_scores(model.scores, "model").items():
            layer = int(re.findall(r"layers\.(\d+)\.", site)[0])
            layers[layer] = layers.get(layer, torch.zeros(1, dtype=torch.float64)) + score.mean()
        layers[None] = torch.stack(list(layers.values())).mean(0)
        by_model.append(layers)
    return {
        layer: normalized(torch.stack([lam * m[layer] for lam, m in zip(lambdas, by_model, strict=True)]), lambdas)
        for layer in by_model[0]
    }


def normalize_scores(scores: Scores, normalize: Normalize) -> dict[str, Tensor]:
    """`F'` before the floor. `layer`: over its layer's mean, per kind, a mean of 0 counting as 1; `model`: over the
    L2 norm of its kind in the model, a norm of 0 counting as 1."""
    if normalize == "none":
        return dict(scores)
    if normalize == "layer":
        return {site: score / _or_one(score.mean()) for site, score in scores.items()}
    norms = {
        nodes: torch.cat([s for site, s in scores.items() if site.endswith(f".{nodes}")]).norm() for nodes in Nodes
    }
    return {site: score / _or_one(norms[Nodes(site.rpartition(".")[2])]) for site, score in scores.items()}


def floored(scores: Scores, floor: float) -> dict[str, Tensor]:
    """No score below `floor` times its layer's mean.

    A node that is dead in every model falls back to lambda; a layer that is dead in one model has no say there.
    """
    return {site: score.clamp_min(floor * float(score.mean())) for site, score in scores.items()}


def weight_shares(models: list[MeasuredModel], weights: Mapping[str, Tensor]) -> list[float]:
    """Each model's mean merge weight over all nodes."""
    return torch.cat(list(weights.values()), dim=1).mean(1).tolist()


def _or_one(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)
