"""`mask_regmean`, see its catalog entry.

A row o of a node minimises `sum_j w_j,o (w - w_j,o) G_j (w - w_j,o)^T`. With equal scores and all options on it is
`regmean`, with Gram matrices that are the identity it is `mask_fisher`.
"""

import torch
from torch import Tensor

from worker.engine.catalog.families import Nodes
from worker.engine.catalog.families.table import Owner
from worker.engine.catalog.methods import MaskRegMeanParameters, MethodParameters
from worker.engine.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.methods.combine import EVERYWHERE, by_slices, model_weights
from worker.engine.methods.mask_fisher import node_weights, rest_weights
from worker.engine.methods.regmean import regress


def build(parameters: MethodParameters, models: list[MeasuredModel]) -> Merger:
    if not isinstance(parameters, MaskRegMeanParameters):
        raise TypeError(f"parameters of mask_regmean expected, got {type(parameters).__name__}")
    owned = node_weights(models, parameters.normalize, parameters.floor)
    rest = rest_weights(models, parameters.rest)
    by_lambda = model_weights(models, EVERYWHERE)[:, None]
    by_lambda /= by_lambda.sum()

    def prepare(versions: Versions) -> BlockMerge:
        slot = versions.slot
        owner, source = slot.owner, slot.input
        by_rest = rest.get(slot.layer, rest[None])
        if source is None:
            return (
                by_slices(versions, by_rest) if owner is None else by_slices(versions, owned[owner.score], owner.axis)
            )
        return regression(versions, source, owner, by_rest)

    def regression(versions: Versions, source: str, owner: Owner | None, by_rest: Tensor) -> BlockMerge:
        whole = versions.whole().versions
        weights, columns = by_lambda, None
        if owner is None:
            weights = by_rest
        elif owner.axis == 0 and (owner.nodes is Nodes.HEADS or parameters.neuron_rows):
            weights = owned[owner.score]
        elif owner.axis == 1 and parameters.columns:
            of_nodes = owned[owner.score]
            weights = torch.ones_like(by_lambda)  # of_nodes has the lambdas in it
            columns = of_nodes.repeat_interleave(versions.shape[1] // of_nodes.shape[1], dim=1)
        merged = regress(source, whole, models, weights, parameters.shrink, parameters.ridge, columns)
        return lambda block: merged[block.rows]

    return prepare
