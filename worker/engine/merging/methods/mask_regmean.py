"""`mask_regmean`, see its catalog entry.

A row o of a node minimises `sum_j w_j,o (w - w_j,o) G_j (w - w_j,o)^T`. With equal scores and all options on, this is
`regmean`; with Gram matrices that are the identity, it is `mask_fisher`.
"""

import torch

from worker.engine.catalog.families import NEURONS, Owner
from worker.engine.catalog.methods import MaskRegMeanParameters, MethodParameters
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_slices, model_weights
from worker.engine.merging.methods.mask_fisher import node_weights, rest_weights, weights_of
from worker.engine.merging.methods.regmean import regression_of


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
            return by_slices(versions, weights_of(owner, owned, versions.place), owner.axis)
        return by_slices(versions, rest(slot, versions.place))

    def regression(versions: Versions, source: str, owner: Owner | None) -> BlockMerge:
        place, columns_axis = versions.place, 0 if versions.slot.transposed else 1
        by_lambda = model_weights(models, place)[:, None]
        by_lambda /= by_lambda.sum()
        weights, columns = by_lambda, None
        if owner is None:
            weights = rest(versions.slot, place)
        elif owner.axis != columns_axis and (owner.kinds != (NEURONS,) or parameters.neuron_rows):
            weights = weights_of(owner, owned, place)
        elif owner.axis == columns_axis and parameters.columns:
            of_nodes = weights_of(owner, owned, place)
            weights = torch.ones_like(by_lambda)  # of_nodes includes the lambdas
            columns = of_nodes.repeat_interleave(versions.shape[columns_axis] // of_nodes.shape[1], dim=1)
        shrink, ridge = parameters.at("shrink", place), parameters.at("ridge", place)
        return regression_of(versions, source, models, weights, shrink, ridge, columns)

    return prepare
