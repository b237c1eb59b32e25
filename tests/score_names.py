"""Scores of mask nodes by name, and their comparison. The product never parses a name."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tests.tiny import HEADS, LAYERS, NEURONS
from tests.tiny_families import TinyFamily
from worker.engine.catalog.families import NODE_KINDS, ScoreName


def named(text: str) -> ScoreName:
    """Of `layers.0.heads`, or `decoder.layers.0.heads`."""
    *stack, _, layer, kind = text.split(".")
    return ScoreName(int(layer), NODE_KINDS[kind], stack="".join(stack))


def by_name(tiny: TinyFamily, of_masks: Sequence[Tensor]) -> dict[ScoreName, Tensor]:
    """Name what was found for the masks of `insert_masks`, (layers, nodes) for each kind of node."""
    return {
        named(tiny.score(nodes, layer)): of_kind[layer]
        for nodes, of_kind in zip(tiny.counts(HEADS, NEURONS), of_masks, strict=True)
        for layer in range(tiny.stored(LAYERS))
    }


def assert_same_in_norm(found: Mapping[ScoreName, Tensor], expected: Mapping[ScoreName, Tensor], within: float) -> None:
    """Every layer's scores of a kind differ by at most this share of their norm, which is not 0."""
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert float(scores.norm()) > 0, name
        error = float((found[name] - scores).norm() / scores.norm())
        assert error <= within, f"{name}: {error}"
