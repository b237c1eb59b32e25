"""The vocabulary in which a family's table is written, and what follows from it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any


class Nodes(StrEnum):
    """The two kinds of mask node. The values are the last part of a score's name."""

    HEADS = "heads"
    NEURONS = "neurons"


class Kind(StrEnum):
    """What a module's tensors are for."""

    EMBEDDING = "embedding"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    ATTENTION_NORM = "attention_norm"
    UP = "up"
    DOWN = "down"
    FEED_FORWARD_NORM = "feed_forward_norm"
    POOLER = "pooler"
    HEAD = "head"
    BUFFER = "buffer"


ROW_OWNERS = {Kind.QUERY: Nodes.HEADS, Kind.KEY: Nodes.HEADS, Kind.VALUE: Nodes.HEADS, Kind.UP: Nodes.NEURONS}
COLUMN_OWNERS = {Kind.ATTENTION_OUTPUT: Nodes.HEADS, Kind.DOWN: Nodes.NEURONS}


@dataclass(frozen=True)
class Owner:
    """The nodes of one layer own slices along one axis of a tensor, in order and of equal length."""

    nodes: Nodes
    layer: int
    axis: int

    @property
    def score(self) -> str:
        return score_name(self.layer, self.nodes)


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the architecture, under its canonical name."""

    name: str
    kind: Kind
    layer: int | None
    is_bias: bool

    @property
    def owner(self) -> Owner | None:
        """Who owns the slices; None for `rest` (norms, output biases, embeddings, pooler) and heads."""
        if self.layer is None:
            return None
        if self.kind in ROW_OWNERS:
            return Owner(ROW_OWNERS[self.kind], self.layer, axis=0)
        if self.kind in COLUMN_OWNERS and not self.is_bias:
            return Owner(COLUMN_OWNERS[self.kind], self.layer, axis=1)
        return None


@dataclass(frozen=True)
class Site:
    """Where a layer's nodes are seen: the input of `module`, (batch, tokens, nodes * width)."""

    score: str
    module: str
    nodes: int


@dataclass(frozen=True)
class Family:
    """One family of architectures, as a table from module path to kind.

    Tensor names on disk are `prefix + module + "." + ("weight" | "bias")`; `{layer}` modules repeat under `layers`.
    """

    model_type: str
    architectures: tuple[str, ...]
    prefix: str
    embeddings: str
    layers: str
    layer_modules: Mapping[str, Kind]
    outer_modules: Mapping[str, Kind]
    heads: tuple[str, ...]
    buffers: tuple[str, ...]
    aliases: Mapping[str, str]
    """Older spellings of the last part of a tensor's name."""
    config_names: Mapping[str, str]
    """Configuration keys of: layers, heads, neurons, hidden, positions."""
    settings: Mapping[str, Any]
    """Further configuration keys that merged checkpoints must share, with what their absence means."""

    def size(self, config: Mapping[str, Any], what: str) -> int:
        """A size from the configuration; `what` is a key of `config_names`. Raises ValueError naming the key."""
        key = self.config_names[what]
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config.json has no usable {key}")
        return value

    def slot(self, name: str) -> Slot | None:
        """The place of the tensor `name`; None when no rule of this family owns it."""
        module, _, part = name.rpartition(".")
        part = self.aliases.get(part, part)
        canonical = f"{module}.{part}"
        if name in (self.prefix + buffer for buffer in self.buffers):
            return Slot(name, Kind.BUFFER, None, False)
        if part not in ("weight", "bias"):
            return None
        if module in self.heads:
            return Slot(canonical, Kind.HEAD, None, part == "bias")
        if not module.startswith(self.prefix):
            return None
        inner = module.removeprefix(self.prefix)
        if inner in self.outer_modules:
            return Slot(canonical, self.outer_modules[inner], None, part == "bias")
        match = self._layer_pattern.fullmatch(inner)
        if match is None or match["module"] not in self.layer_modules:
            return None
        return Slot(canonical, self.layer_modules[match["module"]], int(match["layer"]), part == "bias")

    def sites(self, config: Mapping[str, Any]) -> Iterator[Site]:
        """Where to see every mask node of a model with this configuration, layer by layer."""
        counts = {Nodes.HEADS: self.size(config, "heads"), Nodes.NEURONS: self.size(config, "neurons")}
        for layer in range(self.size(config, "layers")):
            for module, kind in self.layer_modules.items():
                nodes = COLUMN_OWNERS.get(kind)
                if nodes is not None:
                    path = f"{self.prefix}{self.layers.format(layer=layer)}.{module}"
                    yield Site(score_name(layer, nodes), path, counts[nodes])

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        before, after = self.layers.split("{layer}")
        return re.compile(rf"{re.escape(before)}(?P<layer>\d{{1,6}}){re.escape(after)}\.(?P<module>.+)")


def score_name(layer: int, nodes: Nodes) -> str:
    """Name of one layer's scores of one kind, as in `scores/<model>.safetensors`."""
    return f"layers.{layer}.{nodes}"
