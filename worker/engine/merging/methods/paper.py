"""The published rule, for comparison: who owns what as in the code that accompanies arXiv 2403.09891.

Query, key and first-projection rows follow their own node's score; value, the attention's output projection and its
norm follow the layer's mean head score; the second projection and its norm the layer's mean neuron score; embeddings
and pooler the mean over layers of both. Raw sums, no normalisation; a sum of zero is split evenly.
"""

import torch
from torch import Tensor

from worker.engine.catalog.families import Kind, Nodes
from worker.engine.catalog.families.table import score_name
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_slices, model_weights, normalized

BY_NODE = {Kind.QUERY: Nodes.HEADS, Kind.KEY: Nodes.HEADS, Kind.POSITION: Nodes.HEADS, Kind.UP: Nodes.NEURONS}
BY_LAYER_MEAN = {
    Kind.VALUE: Nodes.HEADS,
    Kind.ATTENTION_OUTPUT: Nodes.HEADS,
    Kind.ATTENTION_NORM: Nodes.HEADS,
    Kind.DOWN: Nodes.NEURONS,
    Kind.FEED_FORWARD_NORM: Nodes.NEURONS,
}


def build(models: list[MeasuredModel]) -> Merger:
    layers = len(models[0].scores) // len(Nodes)

    def stacked(layer: int, nodes: Nodes) -> Tensor:
        return torch.stack([m.scores[score_name(layer, nodes)] for m in models])  # (models, nodes)

    overall = torch.stack([stacked(layer, n).mean(1) for layer in range(layers) for n in Nodes]).sum(0) / layers

    def prepare(versions: Versions) -> BlockMerge:
        slot = versions.slot
        lambdas = model_weights(models, versions.place)

        def weights(scores: Tensor) -> Tensor:
            return normalized(lambdas[:, None] * scores, lambdas)

        if slot.layer is None:
            return by_slices(versions, weights(overall[:, None]))
        if slot.kind in BY_NODE:
            return by_slices(versions, weights(stacked(slot.layer, BY_NODE[slot.kind])))
        return by_slices(versions, weights(stacked(slot.layer, BY_LAYER_MEAN[slot.kind]).mean(1, keepdim=True)))

    return prepare
