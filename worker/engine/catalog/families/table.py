"""The classes in which a family's table is written, and the facts that follow from the table."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.nodes import (
    CROSS_HEADS,
    DECODER,
    ENCODER,
    HEADS,
    KV_HEADS,
    NEURONS,
    NodeKind,
    ScoreName,
    layer_name,
)


class Kind(StrEnum):
    """The purpose of a module's tensors."""

    EMBEDDING = "embedding"
    EMBEDDING_PROJECTION = "embedding_projection"  # from the embeddings' size to the hidden size
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    POSITION = "position"  # a head's own view of relative positions
    ATTENTION_OUTPUT = "attention_output"
    QUERY_NORM = "query_norm"
    KEY_NORM = "key_norm"
    ATTENTION_NORM = "attention_norm"
    CROSS_QUERY = "cross_query"  # of attention from a decoder's layer to the encoder's output
    CROSS_KEY = "cross_key"
    CROSS_VALUE = "cross_value"
    CROSS_ATTENTION_OUTPUT = "cross_attention_output"
    CROSS_ATTENTION_NORM = "cross_attention_norm"
    GATE = "gate"  # gives the factors of the neurons in a gated feed-forward layer
    UP = "up"
    DOWN = "down"
    ROUTER = "router"  # chooses the experts of each token
    FEED_FORWARD_NORM = "feed_forward_norm"
    CONVOLUTION = "convolution"
    FINAL_NORM = "final_norm"  # norm after the last layer, where norms come first
    OUTPUT_PROJECTION = "output_projection"  # after it, from the hidden size to the embeddings' size
    POOLER = "pooler"
    HEAD = "head"  # kept per model
    MERGED_HEAD = "merged_head"
    UNREAD = "unread"
    OTHER = "other"  # used for architectures without a table


MOST_KEPT_SLOTS = 10_000
"""Number of slots that a family keeps at hand."""
LONGEST_KEPT_NAME = 200
"""Number of characters of a tensor's name up to which its slot is kept."""


@dataclass(frozen=True)
class Ownership:
    """The kinds of node that own slices of a layer's tensors, by the kind of module.

    A node owns as many neighbouring rows of a weight and of its bias, or columns of a weight, as each other node.
    """

    rows: Mapping[Kind, NodeKind]
    columns: Mapping[Kind, NodeKind]
    """Each kind of node is seen at the input of the module whose columns it owns."""

    @property
    def kinds(self) -> tuple[NodeKind, ...]:
        return tuple(dict.fromkeys((*self.rows.values(), *self.columns.values())))


MULTI_HEAD = Ownership(
    rows={
        **dict.fromkeys((Kind.QUERY, Kind.KEY, Kind.VALUE, Kind.POSITION), HEADS),
        **dict.fromkeys((Kind.GATE, Kind.UP), NEURONS),
    },
    columns={Kind.ATTENTION_OUTPUT: HEADS, Kind.DOWN: NEURONS},
)
"""Ownership where every head has its own query, key and value."""
WITH_CROSS_ATTENTION = Ownership(
    rows={**MULTI_HEAD.rows, **dict.fromkeys((Kind.CROSS_QUERY, Kind.CROSS_KEY, Kind.CROSS_VALUE), CROSS_HEADS)},
    columns={**MULTI_HEAD.columns, Kind.CROSS_ATTENTION_OUTPUT: CROSS_HEADS},
)
"""Ownership where the layers of a decoder also have heads that read the encoder's output."""
GROUPED_QUERY = Ownership(
    rows={Kind.QUERY: HEADS, Kind.KEY: KV_HEADS, Kind.VALUE: KV_HEADS, Kind.GATE: NEURONS, Kind.UP: NEURONS},
    columns=MULTI_HEAD.columns,
)
"""Ownership where groups of heads share a key and a value (Ainslie et al. 2023, arXiv 2305.13245)."""


class Norms(StrEnum):
    """The place of a layer's norms; f is its attention or its feed-forward layer, and f's output is added to x."""

    AFTER_SUMS = "after_sums"  # norm(x + f(x)), as in BERT
    BEFORE_BLOCKS = "before_blocks"  # x + f(norm(x)), as in Llama
    PARALLEL = "parallel"  # x + attention(norm(x)) + feed_forward(norm(x)), as in GPT-NeoX
    AFTER_BLOCKS = "after_blocks"  # x + norm(f(x)), as in OLMo 2, or x + norm(f(norm(x))), as in Gemma 2


LAYER_INPUTS = {
    Kind.QUERY: "attention",
    Kind.KEY: "attention",
    Kind.VALUE: "attention",
    Kind.ATTENTION_OUTPUT: "heads",
    Kind.ROUTER: "feed_forward",
    Kind.CROSS_QUERY: "cross_attention",
    Kind.CROSS_KEY: "encoded",
    Kind.CROSS_VALUE: "encoded",
    Kind.CROSS_ATTENTION_OUTPUT: "cross_heads",
    Kind.GATE: "feed_forward",
    Kind.UP: "feed_forward",
    Kind.DOWN: "neurons",
}
"""Names of the inputs of a layer's linear modules, in the order in which they run."""
RESIDUAL_NORMS: Mapping[Norms, Mapping[Kind, Kind | None]] = {
    Norms.AFTER_SUMS: {Kind.ATTENTION_OUTPUT: Kind.ATTENTION_NORM, Kind.DOWN: Kind.FEED_FORWARD_NORM},
    Norms.BEFORE_BLOCKS: {Kind.ATTENTION_OUTPUT: Kind.FEED_FORWARD_NORM, Kind.DOWN: None},
    Norms.PARALLEL: {Kind.DOWN: None},
    Norms.AFTER_BLOCKS: {},
}
RESIDUAL_NORMS_BESIDE_ENCODER: Mapping[Norms, Mapping[Kind, Kind | None]] = {
    Norms.AFTER_SUMS: {
        **RESIDUAL_NORMS[Norms.AFTER_SUMS],
        Kind.CROSS_ATTENTION_OUTPUT: Kind.CROSS_ATTENTION_NORM,
    },
    Norms.BEFORE_BLOCKS: {
        Kind.ATTENTION_OUTPUT: Kind.CROSS_ATTENTION_NORM,
        Kind.CROSS_ATTENTION_OUTPUT: Kind.FEED_FORWARD_NORM,
        Kind.DOWN: None,
    },
}
"""The same in a decoder's layers that attend to an encoder's output between the two."""
OUTER_INPUTS = {Kind.EMBEDDING_PROJECTION: "embeddings", Kind.POOLER: "pooler", Kind.OUTPUT_PROJECTION: "output"}
LINEAR = (*LAYER_INPUTS, *OUTER_INPUTS, Kind.POSITION)
"""Kinds of linear modules that are merged with the backbone."""

NOT_SHOWING_INPUT = (Kind.QUERY, Kind.KEY, Kind.CROSS_KEY, Kind.GATE)
"""Modules whose input is seen elsewhere: query and key share that of value, and may also run on positions."""

OF_ENCODER_OUTPUT = (Kind.CROSS_KEY, Kind.CROSS_VALUE)
"""Modules of a decoder's layers that read the encoder's tokens."""

AFTER_ATTENTION = (Kind.ATTENTION_OUTPUT, Kind.ATTENTION_NORM, Kind.GATE, Kind.UP)
"""Modules after a layer's attention whose input still has all tokens: attention's output, or a residual."""

EXPERT = re.compile(r"(?<=\bexperts\.)\d{1,6}(?=\.)")
"""The number of an expert in a module's path."""

OLDER_PARTS = {"gamma": "weight", "beta": "bias"}
"""Last parts of names in norms converted from TensorFlow, with their newer spelling."""


@dataclass(frozen=True)
class Fused:
    """A layer's matrix that holds the rows of several kinds, or that is stored as (inputs, outputs).

    All rows are cut into slices of one length, one for each node of each kind.
    """

    parts: tuple[Kind, ...]
    """The kinds of its rows, in order."""
    by_head: bool = False
    """Whether all rows of one head are together, or, where heads share a key and a value, all rows of one group of
    heads. Otherwise all rows of one kind are together."""
    transposed: bool = False
    """Whether the weight is stored as (inputs, outputs), as that of transformers' Conv1D is."""

    @property
    def kind(self) -> Kind:
        """The kind that stands for all, see `Slot.kind`: the last at whose module the input is seen."""
        shown = [part for part in self.parts if part not in NOT_SHOWING_INPUT]
        return (shown or self.parts)[-1]


class Part(NamedTuple):
    """Rows of one kind, or columns, with the nodes that own slices of them, in order and of equal length."""

    kind: Kind
    score: ScoreName


@dataclass(frozen=True)
class Owner:
    """The nodes of one layer that own slices along one axis of a tensor; all slices have the same length."""

    parts: tuple[Part, ...]
    """One part, or several where the matrix is fused."""
    axis: int
    by_head: bool = False
    """Whether slices of several parts come by head, see `Fused`. Otherwise each part follows the one before it."""

    @property
    def scores(self) -> tuple[ScoreName, ...]:
        """Names of the scores of all parts."""
        return tuple(part.score for part in self.parts)

    @property
    def kinds(self) -> tuple[NodeKind, ...]:
        """The kinds of node that own slices, each once."""
        return tuple(dict.fromkeys(score.kind for score in self.scores))


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the architecture, under its canonical name."""

    name: str
    kind: Kind
    """The purpose of the tensor; that of a fused one is its last part's whose module shows the input."""
    layer: int | None
    is_bias: bool
    owner: Owner | None = None
    """The nodes that own its slices; None for `rest` (norms, output biases, embeddings, pooler) and heads."""
    transposed: bool = False
    """Whether it is a linear layer's weight that is stored as (inputs, outputs)."""
    name_in_files: str | None = None
    """Name that files have, where it is another than the model's."""
    expert: int | None = None
    """Number of the expert that it is part of, in a layer that is a mixture of experts."""
    stack: str = ""
    """The stack of its layer, see `ScoreName.stack`."""

    @property
    def reads_decoder(self) -> bool:
        """Whether the tokens of its input are the decoder's, not the encoder's."""
        return self.stack == DECODER and self.kind not in OF_ENCODER_OUTPUT

    @property
    def stored(self) -> str:
        """The name that files have, as transformers writes them."""
        return self.name_in_files or self.name

    @property
    def input(self) -> str | None:
        """Name of the input that the tensor multiplies; None where it is no matrix of a linear layer."""
        if self.is_bias:
            return None
        if self.layer is None:
            return OUTER_INPUTS.get(self.kind)
        if self.kind not in LAYER_INPUTS:
            return None
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"{layer_name(self.layer, self.stack)}.{expert}{LAYER_INPUTS[self.kind]}"

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's weight, or, without a table, may be: it is in a layer, and is no bias."""
        if self.is_bias:
            return False
        return self.layer is not None if self.kind is Kind.OTHER else self.kind in LINEAR

    @property
    def shows_input(self) -> bool:
        """Whether `input` is seen at this module."""
        return self.input is not None and self.kind not in NOT_SHOWING_INPUT


@dataclass(frozen=True)
class Site:
    """A module at whose input, (batch, tokens, values), nodes of a layer are seen."""

    module: str
    counts: Mapping[ScoreName, int]
    """Number of nodes of each kind that is seen there. The nodes of a kind are equal runs of the values, in order."""


@dataclass(frozen=True)
class Stack:
    """A list of layers that run one after another, and have the same modules."""

    name: str
    """See `ScoreName.stack`."""
    layers: str
    """Path of a layer under the family's prefix, with `{layer}` for its number."""
    modules: Mapping[str, Kind | Fused]
    """Kinds of modules by their path within a layer."""

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Kinds of the modules as slots have them."""
        return {module: kind.kind if isinstance(kind, Fused) else kind for module, kind in self.modules.items()}

    def size(self, what: str) -> str:
        """Return the name of a size of this stack, see `Family.size`."""
        return f"{DECODER}_{what}" if self.name == DECODER else what


@dataclass(frozen=True)
class Family:
    """One family of architectures, as a table from module path to kind.

    Tensor names are `prefix + module + "." + ("weight" | "bias")`; `{layer}` modules repeat under `layers`, and
    `{expert}` modules for each expert of a layer. They are the names on disk, unless `stored_layers` says otherwise.
    """

    model_type: str
    head: Head
    """The head that its checkpoints have; see `under` for other kinds."""
    prefix: str
    embeddings: str
    """Path of the module that turns token ids into vectors; gradients end there."""
    layers: str
    layer_modules: Mapping[str, Kind | Fused]
    """Kinds of modules by their path within a layer. A weight may have a bias or none, and a setting may leave a module
    out."""
    outer_modules: Mapping[str, Kind]
    """Kinds of modules outside the layers, by their path under `prefix`."""
    unread: tuple[str, ...]
    """Tensors under `prefix`, with `{layer}` for each layer's number, that transformers once saved in such checkpoints
    and no longer reads; merges omit them."""
    config_names: Mapping[str, str]
    """Configuration keys of the sizes layers, heads, neurons, hidden and positions; kv_heads and head_size may lack.

    Where layers are mixtures of experts, `experts` is how many there are in each, `experts_per_token` how many of
    them compute a token, and `neurons` counts those of one expert.
    Where layers share their weights, `layers` counts those that are stored, and `uses` is how many times these are run,
    one after another. Sizes of a decoder beside an encoder have `decoder_` before their names."""
    settings: Mapping[str, Any]
    """Further keys that change what a model computes and do not show in shapes, each with its value if it is missing.

    Merged checkpoints must share them. Where that value is a tuple, the setting is a set of words."""
    supported: Mapping[str, Any]
    """Keys for which only one value is available; a missing key has it."""
    decoder: Stack | None = None
    """The decoder's layers, where a model has an encoder and a decoder; `layers` are the encoder's then."""
    absent_sizes: Mapping[str, int] = field(default_factory=dict)
    """Values of sizes where the configuration lacks the key. Else kv_heads and head_size follow from other sizes, and
    the decoder's sizes are the encoder's."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of keys in `config_names`, by the key."""
    widening: int | None = None
    """Number of neurons by unit of the hidden size where the configuration says none; None: it must say it."""
    outer_parameters: Mapping[str, Kind] = field(default_factory=dict)
    """Kinds of parameters outside the layers that are no module's weight or bias, by their path under `prefix`."""
    older_prefix: str | None = None
    """`prefix` in the names that older versions of transformers wrote."""
    stored_layers: str | None = None
    """`layers` in the names that files have, where transformers renames tensors as it loads and saves them."""
    stored_modules: Mapping[str, str] = field(default_factory=dict)
    """Layer modules that have other paths in such names, with these paths."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parameters of a layer in which transformers keeps matrices of all experts, (experts, rows, columns), each with
    the modules whose rows it has, in order. Files may have them in place of the modules' weights."""
    part_of: Mapping[str, str] = field(default_factory=dict)
    """Model types of checkpoints that are the backbone alone and have a configuration of their own, each with the key
    under which the family's configuration has it. Such a checkpoint may be a base."""
    padding_position: str | None = None
    """Configuration key of padding's position; a row's first token has the next one. None: the first token has 0."""
    ownership: Ownership = MULTI_HEAD
    is_causal: bool = False
    """Whether a token's output depends on no later token, as in a language model."""
    norms: Norms = Norms.AFTER_SUMS
    norms_where: Mapping[str, tuple[Any, Norms]] = field(default_factory=dict)
    """Settings of which one value says that norms are elsewhere, each with that value; the first counts."""
    absent_in_first_layer: tuple[str, ...] = ()
    """Modules of `layer_modules` that the first layer does not have."""
    hidden_vectors: int = 16
    """Number of vectors of the hidden size that the backward pass keeps in each layer, per token."""
    neuron_vectors: int = 4
    """Number of vectors with a value for each neuron that it keeps in each layer, per token."""
    attention_rows: int = 1
    """Number of rows as long as the sequence that it keeps in each layer, per token and attention head."""

    def __post_init__(self) -> None:
        for module, kind in self.layer_modules.items():
            parts = kind.parts if isinstance(kind, Fused) else ()
            if len(parts) > 1 and not self.ownership.rows.keys() >= {*parts}:
                raise ValueError(f"{self.model_type}: {module} is fused of kinds whose rows no nodes own")

    @cached_property
    def _known_slots(self) -> dict[str, Slot | None]:
        """Slots by the names that were asked for: a plan asks for each of its names many times."""
        return {}

    @cached_property
    def stacks(self) -> Sequence[Stack]:
        """The stacks of layers, in the order in which they run."""
        first = Stack(ENCODER if self.decoder else "", self.layers, self.layer_modules)
        return (first, self.decoder) if self.decoder else (first,)

    @cached_property
    def layer_kinds(self) -> Mapping[str, Kind]:
        """Kinds of the layer modules as slots have them."""
        return self.stacks[0].kinds

    def norms_in(self, config: Mapping[str, Any]) -> Norms:
        """Return where a layer's norms are in a model with this configuration."""
        found = (norms for key, (value, norms) in self.norms_where.items() if self.setting(config, key) == value)
        return next(found, self.norms)

    def residual_norms(self, config: Mapping[str, Any], stack: str = "") -> Mapping[Kind, Kind | None]:
        """Map each kind of module whose output is added to a residual to the norm that reads the sum.

        None means that the sum is the layer's output. An output that is normalised before it is added is not there.
        """
        return (RESIDUAL_NORMS_BESIDE_ENCODER if stack == DECODER else RESIDUAL_NORMS)[self.norms_in(config)]

    @property
    def shares_layers(self) -> bool:
        """Whether the layers are run several times, one after another, with the same weights."""
        return "uses" in self.config_names

    def under(self, head: Head, prefix: str | None = None) -> "Family":
        """Return the same backbone with another head; `prefix` is that of its tensors beside that head."""
        if head == self.head:
            return self
        prefix = self.prefix if prefix is None else prefix
        embeddings = prefix + self.embeddings.removeprefix(self.prefix)
        return replace(self, head=head, prefix=prefix, embeddings=embeddings)

    def size(self, config: Mapping[str, Any], what: str) -> int:
        """Return a size from the configuration; `what` is a key of `config_names`, `kv_heads`, `head_size` or `uses`.

        Where the configuration does not say otherwise, and `absent_sizes` neither, each head has its own key and
        value, all heads together are as wide as the hidden states, the layers are run once, and a decoder is as large
        as the encoder.

        Raises:
            ValueError: the size is no positive number; the message names the key.
        """
        key = self.config_names.get(what)
        if key is None and what == "uses":
            return 1
        if key is not None and key not in config:
            key = self.spellings.get(key, key)
        value = None if key is None else _value_at(config, key, self.absent_sizes.get(what))
        if value is None and what.startswith(f"{DECODER}_"):
            return self.size(config, what.removeprefix(f"{DECODER}_"))
        if value is None and what == "kv_heads":
            return self.size(config, "heads")
        if value is None and what == "head_size":
            return self.size(config, "hidden") // self.size(config, "heads")
        if value is None and what == "neurons" and self.widening is not None:
            return self.widening * self.size(config, "hidden")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config.json has no usable {key}")
        return value

    def owned(self, config: Mapping[str, Any], kind: NodeKind, stack: str = "") -> int:
        """Return how many rows or columns of a tensor a layer's nodes own. Raises ValueError, which names the key."""
        of = self._stack(stack)
        width = 1 if kind.width is None else self.size(config, of.size(kind.width))
        return self.size(config, of.size(kind.count)) * width

    def max_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the number of tokens for which positions are enough. Raises ValueError, which names the key.

        An image is one token for each patch, and one before them.
        """
        if "patch" in self.config_names:
            return (self.size(config, "image") // self.size(config, "patch")) ** 2 + 1
        positions = int(min(self.size(config, "positions"), _unscaled(config)))
        if self.padding_position is None:
            return positions
        padding = self.setting(config, self.padding_position)
        if not isinstance(padding, int) or isinstance(padding, bool) or not 0 <= padding < positions - 1:
            raise ValueError(f"config.json has no usable {self.padding_position}")
        return positions - padding - 1

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """Return the value of a setting; a set of words, from a list or a text with `|` between, is a sorted tuple."""
        absent = self.settings.get(key, self.supported.get(key))
        value = _value_at(config, key, absent)
        if not isinstance(absent, tuple):
            return value
        words = value.split("|") if isinstance(value, str) else value or ()
        if not isinstance(words, list | tuple):
            return value
        return tuple(sorted(str(word).strip().lower() for word in words))

    def slot(self, name: str) -> Slot | None:
        """Return the slot of the tensor `name`; None when the table has none for it."""
        if len(name) > LONGEST_KEPT_NAME:
            return self._slot(name)
        known = self._known_slots
        if name not in known:
            if len(known) >= MOST_KEPT_SLOTS:  # names come from files, so there is no end to them
                known.clear()
            known[name] = self._slot(name)
        return known[name]

    def _slot(self, name: str) -> Slot | None:
        if self.older_prefix is not None and name.startswith(self.older_prefix):
            name = self.prefix + name.removeprefix(self.older_prefix)
        module, _, part = name.rpartition(".")
        part = OLDER_PARTS.get(part, part)
        canonical = f"{module}.{part}"
        for own in self.head.modules if part in ("weight", "bias") else ():
            stored = self.head.stored.get(own)
            if module in (own, stored):
                of_head = Kind.MERGED_HEAD if self.head.merges else Kind.HEAD
                in_files = None if stored is None else f"{stored}.{part}"
                return Slot(f"{own}.{part}", of_head, None, part == "bias", name_in_files=in_files)
        if self._unread_pattern.fullmatch(canonical):
            return Slot(canonical, Kind.UNREAD, None, False)
        if name in self.head.parameters:
            return Slot(name, Kind.MERGED_HEAD if self.head.merges else Kind.HEAD, None, False)
        outer = self.outer_parameters.get(name.removeprefix(self.prefix)) if name.startswith(self.prefix) else None
        if outer is not None:
            return Slot(name, outer, None, False)
        if part not in ("weight", "bias"):
            return None
        if not module.startswith(self.prefix):
            return None
        inner = module.removeprefix(self.prefix)
        if inner in self.outer_modules:
            return Slot(canonical, self.outer_modules[inner], None, part == "bias")
        found = self._in_layer(inner)
        if found is None:
            return None
        (stack, layer, own, expert), is_bias = found, part == "bias"
        if layer == 0 and own in self.absent_in_first_layer:
            return None
        kind = stack.modules[own]
        fused = kind if isinstance(kind, Fused) else Fused((kind,))
        owner, transposed = self._owner(fused, layer, expert, stack.name, is_bias), fused.transposed and not is_bias
        name = f"{self.layer_path(layer, stack.name)}{own.format(expert=expert)}.{part}"
        stored = f"{self.prefix}{self.stored_path(layer, own, expert, stack.name)}.{part}"
        in_files = None if stored == name else stored
        return Slot(name, fused.kind, layer, is_bias, owner, transposed, in_files, expert, stack.name)

    def stored_path(self, layer: int, module: str, expert: int | None = None, stack: str = "") -> str:
        """Return the path under `prefix` that files have for a module of a layer."""
        stored = self.stored_modules.get(module, module)
        stored = stored if expert is None else stored.format(expert=expert)
        return f"{(self.stored_layers or self._stack(stack).layers).format(layer=layer)}.{stored}"

    def unstacked(self, name: str) -> list[str] | None:
        """Return the names that the weights of all experts have in files, with `{expert}`, for a tensor of `stacked`.

        Rows of these weights follow one another in the tensor. None: the tensor is none of `stacked`.
        """
        match = self._stacked_pattern.fullmatch(name)
        if match is None:
            return None
        before, layer = match["before"], int(match["layer"])
        paths = (self.stored_path(layer, module) for module in self.stacked[match["module"]])
        return [f"{before}{path}.weight" for path in paths]

    def in_files(self, name: str) -> str:
        """Return the name that files have for a tensor, which may lack `prefix`; one that the table lacks stays."""
        before = "" if name.startswith(self.prefix) else self.prefix
        slot = self.slot(before + name)
        return name if slot is None or slot.layer is None else slot.stored.removeprefix(before)

    def _in_layer(self, path: str) -> tuple[Stack, int, str, int | None] | None:
        """Find a module of a layer by its name in the model or in files: stack, layer, path within it, and expert."""
        for stack, pattern, modules in self._layer_spellings:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            expert = EXPERT.search(match["module"]) if self.stacked else None
            module = match["module"] if expert is None else EXPERT.sub("{expert}", match["module"])
            if module in modules:
                return stack, int(match["layer"]), modules[module], None if expert is None else int(expert[0])
        return None

    def _owner(self, fused: Fused, layer: int, expert: int | None, stack: str, is_bias: bool) -> Owner | None:
        axis = int(fused.transposed and not is_bias)  # of the rows
        rows, columns = self.ownership.rows, self.ownership.columns
        if fused.parts[0] in rows:
            parts = tuple(Part(kind, ScoreName(layer, rows[kind], expert, stack)) for kind in fused.parts)
            return Owner(parts, axis, fused.by_head)
        if fused.kind in columns and not is_bias:
            return Owner((Part(fused.kind, ScoreName(layer, columns[fused.kind], expert, stack)),), 1 - axis)
        return None

    def sites(self, config: Mapping[str, Any]) -> Iterator[Site]:
        """Yield the sites of all mask nodes of a model with this configuration, layer by layer."""
        for stack in self.stacks:
            for layer in range(self.size(config, stack.size("layers"))):
                for module, kind in stack.kinds.items():
                    seen = self.ownership.columns.get(kind)
                    if seen is None:
                        continue
                    kinds = [nodes for nodes in self.ownership.kinds if seen in (nodes, nodes.groups)]
                    sizes = {nodes: self.size(config, stack.size(nodes.count)) for nodes in kinds}
                    experts = range(self.size(config, "experts")) if "{expert}" in module else (None,)
                    for expert in experts:
                        counts = {ScoreName(layer, nodes, expert, stack.name): size for nodes, size in sizes.items()}
                        path = self.layer_path(layer, stack.name) + module.format(expert=expert)
                        yield Site(path, counts)

    def narrowing(self, config: Mapping[str, Any]) -> list[str]:
        """Return the modules of the last layer from whose input on the first token is enough, in the layer's last use.

        The outputs that the head reads, and their gradients, stay the same.
        """
        if not self.head.reads_first_token:
            return []
        last = self.layer_path(self.size(config, "layers") - 1)
        before = {Kind.ATTENTION_NORM} if self.norms is Norms.BEFORE_BLOCKS else set()
        return [last + module for module, kind in self.layer_kinds.items() if kind in {*AFTER_ATTENTION} - before]

    def layer_path(self, layer: int, stack: str = "") -> str:
        """Return the prefix of the names of a layer's tensors; without a stack, it is the first one's."""
        return f"{self.prefix}{self._stack(stack).layers.format(layer=layer)}."

    def _stack(self, name: str) -> Stack:
        return next((stack for stack in self.stacks if stack.name == name), self.stacks[0])

    @cached_property
    def _unread_pattern(self) -> re.Pattern[str]:
        names = (re.escape(self.prefix + unread) for unread in (*self.unread, *self.head.unread))
        return re.compile("|".join(names).replace(re.escape("{layer}"), r"\d{1,6}") or r"(?!)")

    @cached_property
    def _stacked_pattern(self) -> re.Pattern[str]:
        before, after = map(re.escape, self.layers.split("{layer}"))
        modules = "|".join(map(re.escape, self.stacked)) or r"(?!)"
        prefix = re.escape(self.prefix)
        return re.compile(rf"(?P<before>(?:{prefix})?){before}(?P<layer>\d{{1,6}}){after}\.(?P<module>{modules})")

    @cached_property
    def _layer_spellings(self) -> Sequence[tuple[Stack, re.Pattern[str], Mapping[str, str]]]:
        """Patterns of the names of layers' modules, each with the modules' paths in the model by those in the names."""
        found = [(of, _layer_pattern(of.layers), {module: module for module in of.modules}) for of in self.stacks]
        if self.stored_layers is not None or self.stored_modules:
            stored = {self.stored_modules.get(module, module): module for module in self.layer_modules}
            found.append((self.stacks[0], _layer_pattern(self.stored_layers or self.layers), stored))
        return found


def _value_at(config: Mapping[str, Any], key: str, absent: Any) -> Any:
    """Return the value of a key, in which dots separate those of objects within each other."""
    outer, _, inner = key.partition(".")
    if not inner:
        return config.get(key, absent)
    value = config.get(outer)
    return _value_at(value, inner, absent) if isinstance(value, Mapping) else absent


def _layer_pattern(layers: str) -> re.Pattern[str]:
    before, after = layers.split("{layer}")
    return re.compile(rf"{re.escape(before)}(?P<layer>\d{{1,6}}){re.escape(after)}\.(?P<module>.+)")


def _unscaled(config: Mapping[str, Any]) -> float:
    """Return the number of tokens from which on rotary positions depend on the longest row of a batch; maybe infinite.

    So it is with LongRoPE (Ding et al. 2024, arXiv 2402.13753), which has factors for short and for long batches.
    """
    rotary = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rotary, Mapping) or rotary.get("rope_type", rotary.get("type")) not in ("longrope", "su"):
        return math.inf
    limit = rotary.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else math.inf
