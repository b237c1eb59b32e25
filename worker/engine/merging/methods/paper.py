"""The published rule, for comparison: slices have the owners of the code that accompanies arXiv 2403.09891.

Query, key and first-projection rows follow their own node's score; value, the attention's output projection and its
norm follow the layer's mean head score; the second projection and its norm the layer's mean neuron score; embeddings
and pooler the mean over layers of both. Raw sums, no normalisation; a sum of zero is split evenly.
"""

import torch
from torch import Tensor

from worker.engine.catalog.families import CROSS_HEADS, HEADS, NEURONS, Kind, ScoreName
from worker.engine.merging.methods.blocks import BlockMerge, MeasuredModel, Merger, Versions
from worker.engine.merging.methods.combine import by_layer, by_slices, model_weights, normalized, of_slices

BY_NODE = (Kind.QUERY, Kind.KEY, Kind.POSITION, Kind.CROSS_QUERY, Kind.CROSS_KEY, Kind.GATE, Kind.UP)
BY_LAYER_MEAN = {
    Kind.VALUE: HEADS,
    Kind.QUERY_NORM: HEADS,
    Kind.KEY_NORM: HEADS,
    Kind.ATTENTION_OUTPUT: HEADS,
    Kind.ATTENTION_NORM: HEADS,
    Kind.CROSS_VALUE: CROSS_HEADS,
    Kind.CROSS_ATTENTION_OUTPUT: CROSS_HEADS,
    Kind.CROSS_ATTENTION_NORM: CROSS_HEADS,
    Kind.DOWN: NEURONS,
    Kind.ROUTER: NEURONS,
    Kind.FEED_FORWARD_NORM: NEURONS,
}


def build(models: list[MeasuredModel]) -> Merger:
    def stacked(score: ScoreName) -> Tensor:
        return torch.stack([m.scores[score] for m in models])  # (models, nodes)

    of_layers = [by_layer(model.scores) for model in models]
    means = {key: torch.stack([of_model[key] for of_model in of_layers]).mean(1) for key in of_layers[0]}  # (models,)
    ordered = sorted(means, key=lambda key: (*key[:2], key[2].name))
    overall = torch.stack([means[key] for key in ordered]).sum(0) / len({key[:2] for key in means})

    def prepare(versions: Versions) -> BlockMerge:
        slot = versions.slot
        lambdas = model_weights(models, versions.place)

        def weights(scores: Tensor) -> Tensor:
            return normalized(lambdas[:, None] * scores, lambdas)

        if slot.layer is None:
            return by_slices(versions, weights(overall[:, None]))
        owner = slot.owner
        if owner is not None and any(part.kind in BY_NODE for part in owner.parts):
            parts = [stacked(part.score) for part in owner.parts]
            for part, scores in zip(owner.parts, parts, strict=True):
                if part.kind not in BY_NODE:
                    scores[:] = scores.mean(1, keepdim=True)
            return by_slices(versions, weights(of_slices(owner, parts)), owner.axis)
        return by_slices(versions, weights(means[slot.stack, slot.layer, BY_LAYER_MEAN[slot.kind]][:, None]))

    return prepare
