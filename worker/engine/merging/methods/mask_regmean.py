"""`mask_regmean`, see its catalog entry.

A row o of a node minimises `sum_j w_j,o (w - w_j,o) G_j (w - w_j,o)^T`. With equal scores and all options on, this is
`regmean`; with Gram matrices that are the identity, it is `mask_fisher`.
"""

import torch

from worker.engine.catalog.families import NEURONS, Owner
from worker.engine.catalog.methods import MaskRegMeanParameters, MethodParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_slices, model_weights
from worker.engine.merging.methods.mask_fisher import node_weights, rest_weights
from worker.engine.merging.methods.regmean import regress


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskRegMeanParameters):
        raise TypeError(f"parameters of mask_regmean expected, got {type(parameters).__name__}")
    owned = node_weights(models, parameters)
    rest = rest_weights(models, parameters.rest)

    def prepare(versions: Versions) -> BlockMerge:
        slot = versions.slot
        owner, source = slot.owner, slot.input
        if source is not None:
            return regression(versions, source, owner)
        if owner is not None:
            return by_slices(versions, owned(owner.score, versions.place), owner.axis)
        return by_slices(versions, rest(slot.layer, versions.place))

    def regression(versions: Versions, source: str, owner: Owner | None) -> BlockMerge:
        whole, place = versions.whole().versions, versions.place
        by_lambda = model_weights(models, place)[:, None]
        by_lambda /= by_lambda.sum()
        weights, columns = by_lambda, None
        if owner is None:
            weights = rest(versions.slot.layer, place)
        elif owner.axis == 0 and (owner.score.kind != NEURONS or parameters.neuron_rows):
            weights = owned(owner.score, place)
        elif owner.axis == 1 and parameters.columns:
            of_nodes = owned(owner.score, place)
            weights = torch.ones_like(by_lambda)  # of_nodes includes the lambdas
            columns = of_nodes.repeat_interleave(versions.shape[1] // of_nodes.shape[1], dim=1)
        shrink, ridge = parameters.at("shrink", place), parameters.at("ridge", place)
        merged = regress(source, whole, models, weights, shrink, ridge, columns)
        return lambda block: merged[block.rows]

    return prepare
