"""Kinds of mask node, stacks of layers, and the names of scores."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class NodeKind:
    """One kind of mask node, of which every layer of a model has equally many."""

    name: str
    """Last part of a score's name."""
    title: str
    """Name of several nodes in reports."""
    count: str
    """Name of the size, see `Family.size`, that is the number of nodes in a layer."""
    width: str | None = None
    """Name of the size that is the number of rows or columns in each node's slice of a tensor; None means one."""
    groups: "NodeKind | None" = None
    """The kind whose nodes are grouped: a node of this kind stands for a run of those, and all runs are equally long.
    Its gradient is the sum of theirs, and is squared after summing."""

    def __str__(self) -> str:
        return self.name


HEADS = NodeKind("heads", "attention heads", count="heads", width="head_size")
KV_HEADS = NodeKind("kv_heads", "key and value heads", count="kv_heads", width="head_size", groups=HEADS)
CROSS_HEADS = NodeKind("cross_heads", "cross-attention heads", count="heads", width="head_size")
"""Heads of a decoder's layers that read the encoder's output."""
NEURONS = NodeKind("neurons", "neurons", count="neurons")

NODE_KINDS = {kind.name: kind for kind in (HEADS, KV_HEADS, CROSS_HEADS, NEURONS)}

ENCODER = "encoder"
DECODER = "decoder"


class ScoreName(str):
    """Name of one layer's scores of one kind, as in `scores/<model>.safetensors`: `layers.0.heads`.

    Each expert of a mixture has scores of its own: `layers.0.experts.3.neurons`. Where a model has an encoder and a
    decoder, each numbers its layers from 0: `decoder.layers.0.cross_heads`. The name is the text that is written, and
    has its parts as attributes, so that nobody has to parse it.
    """

    __slots__ = ("expert", "kind", "layer", "stack")
    layer: int
    kind: NodeKind
    expert: int | None
    """Number of the expert; None for nodes that the whole layer has."""
    stack: str
    """`encoder` or `decoder`; empty where a model has one stack of layers."""

    def __new__(cls, layer: int, kind: NodeKind, expert: int | None = None, stack: str = "") -> Self:
        name = super().__new__(cls, f"{layer_name(layer, stack)}.{_of_expert(expert)}{kind}")
        name.layer, name.kind, name.expert, name.stack = layer, kind, expert, stack
        return name

    def __getnewargs__(self) -> tuple[int, NodeKind, int | None, str]:  # type: ignore[override]
        return self.layer, self.kind, self.expert, self.stack


def layer_name(layer: int, stack: str = "") -> str:
    """Return the name of a layer, as in the names of its scores and inputs."""
    return f"{stack}.layers.{layer}" if stack else f"layers.{layer}"


def _of_expert(expert: int | None) -> str:
    return "" if expert is None else f"experts.{expert}."
