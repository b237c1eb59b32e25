"""Tells what a tensor is by its name, for architectures without a table.

That is enough for methods that measure nothing. They merge tensors of equal names, and only need to know whether a
tensor is no weight at all (a buffer), and where it is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from worker.engine.catalog.checkpoints.info import FLOATS, CheckpointInfo, TensorInfo
from worker.engine.catalog.checkpoints.library import LAYER, Architecture, collapsed
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import OLDER_PARTS
from worker.engine.catalog.primitives.errors import InvalidCheckpoint
from worker.engine.catalog.primitives.values import TensorPlace

BEFORE_LAYERS = re.compile(
    r"embed|patch|position(al)?_enc|(^|\.)(wte|wpe|shared|emb|pre_|positions?\.|conv(\d|_layers|_stem|_in\.))"
)
EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)
"""Ends of names of the embedding matrix; those that others are copies of come first."""
OUTPUT_EMBEDDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "decoder.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
    "proj_out.weight",
)
"""Ends of names of the matrix that gives logits, which is the embedding matrix where both are tied."""
HEADS = ("score.weight", "score.bias", "classifier.weight", "classifier.bias", "qa_outputs.weight", "qa_outputs.bias")
"""Ends of the names of heads that fine-tuning starts from scratch."""
SHARED_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of tensors that are always copies of `shared.weight`, if there is one."""


@dataclass(frozen=True)
class Layer:
    """The parts of the name of a tensor in a layer, `{stack}.{number}.{inner}`."""

    stack: str
    number: int
    inner: str


@lru_cache(maxsize=1 << 17)  # asked a dozen times of every name in a plan
def layer_of(name: str) -> Layer | None:
    """Return the layer of a tensor; None outside the layers."""
    match = LAYER.fullmatch(name)
    return Layer(match["stack"], int(match["number"]), match["inner"]) if match else None


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Return the lists of layers, each with its number of layers."""
    lengths: dict[str, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            lengths[layer.stack] = max(lengths.get(layer.stack, 0), layer.number + 1)
    return lengths


def slot_of(name: str) -> Slot:
    """Return the slot of a tensor of which nothing but its name is known."""
    layer = layer_of(name)
    return Slot(name, Kind.OTHER, None if layer is None else layer.number, name.endswith("bias"))


def place_of(name: str, stacks: Mapping[str, int], known: Architecture | None = None) -> TensorPlace:
    """Return a tensor's place: its depth is 0 before the layers and 1 after them.

    Args:
        stacks: lists of layers, each with its number of layers.
        known: the tensor's class; without it the name tells.
    """
    layer = layer_of(name)
    if layer is not None:
        count = stacks[layer.stack]
        return TensorPlace(name, layer.number / max(1, count - 1), layer.number, count)
    return TensorPlace(name, 0.0 if is_before_layers(name, known) else 1.0)


def is_before_layers(name: str, known: Architecture | None = None) -> bool:
    """Return whether a tensor outside the layers comes before them, as embeddings and their norms do."""
    own = None if known is None else own_name(known, name)
    if known is not None and own in known.all_names:
        return own in known.before
    return not ends_with(name, OUTPUT_EMBEDDINGS) and BEFORE_LAYERS.search(name.lower()) is not None


def is_buffer(tensor: TensorInfo, known: Architecture | None = None) -> bool:
    """Return whether it is computed from the configuration, not learned: integers, masks, rotary frequencies.

    Args:
        known: the tensor's class. The names tell of tensors that it does not have, as older checkpoints may.
    """
    if tensor.dtype not in FLOATS:
        return True
    if known is not None and (known.computed or known.unsaved):
        own = own_names(known, [tensor.name])[tensor.name]
        if collapsed(own) in known.computed or own in known.unsaved:
            return True
    if tensor.name.endswith(("rotary_emb.inv_freq", ".masked_bias", "position_ids")):
        return True
    # Causal masks of GPT-2, GPT-Neo and GPT-NeoX have these names; with one axis, such a tensor is a bias.
    return tensor.name.endswith(("attn.bias", "attention.bias")) and len(tensor.shape) == 4


def tensors_by_name(info: CheckpointInfo, like: CheckpointInfo) -> dict[str, TensorInfo]:
    """Return the checkpoint's tensors under the names that `like` gives them.

    The same model is published with and without the prefix of the model below its head (`transformer.h.0.…`, `h.0.…`),
    and norms have two spellings.

    Raises:
        InvalidCheckpoint: a tensor has both names.
    """
    stacks = stacks_of([*info.tensors, *like.tensors])
    outer = dict.fromkeys(stack.partition(".")[0] for stack in stacks if "." in stack)
    prefixes = {prefix: at for at, prefix in enumerate(outer)}
    below: dict[str, str] = {}  # names in `like` by their part after the first prefix
    for name in like.tensors:
        prefix, _, rest = name.partition(".")
        if prefix in prefixes:
            before = below.setdefault(rest, name).partition(".")[0]
            if prefixes[prefix] < prefixes[before]:
                below[rest] = name

    def in_like(spelling: str) -> str | None:
        if spelling in like.tensors:
            return spelling
        prefix, _, rest = spelling.partition(".")
        return below.get(spelling) or (rest if prefix in prefixes and rest in like.tensors else None)

    found: dict[str, TensorInfo] = {}
    for name, tensor in info.tensors.items():
        known = next((known for spelling in spellings(name) if (known := in_like(spelling))), name)
        if known in found:
            raise InvalidCheckpoint(info.source, f"tensor {known} is there under two spellings")
        found[known] = tensor
    return found


def own_names(known: Architecture, names: Iterable[str]) -> dict[str, str]:
    """Return the class's name of each tensor on disk, which may lack the prefix of the model below the head."""
    found = {}
    for name in names:
        if known.reads(name):
            found[name] = name
            continue
        others = [
            own
            for spelling in spellings(name)
            for own in (spelling, f"{known.prefix}.{spelling}", spelling.removeprefix(f"{known.prefix}."))
        ]
        found[name] = next((own for own in others if known.reads(own)), name)
    return found


def own_name(known: Architecture, name: str) -> str:
    """Return the class's name of a tensor on disk outside the layers, also of one that it renames as it loads it."""
    return name if known.reads(name) else known.names_in_model.get(name) or own_names(known, [name])[name]


def spellings(name: str) -> tuple[str, ...]:
    """Return a tensor's name, and the other spelling that norms of models converted from TensorFlow may have."""
    module, _, part = name.rpartition(".")
    if not module.endswith("LayerNorm"):
        return (name,)
    others = {**OLDER_PARTS, **{new: old for old, new in OLDER_PARTS.items()}}
    return (name, f"{module}.{others[part]}") if part in others else (name,)


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Return whether a tensor's name ends with one of these, in whole words."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
