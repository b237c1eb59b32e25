"""Describes tensors of architectures without a table, by their names and shapes and the configuration.

That is enough for methods that measure nothing. They merge tensors of equal names, and only need to know whether a
tensor is no weight at all (a buffer) or a second copy of another (tied).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from worker.engine.catalog.checkpoints.architectures import classifies, labels_of, use_of
from worker.engine.catalog.checkpoints.headers import FLOATS, CheckpointInfo, TensorInfo, is_packed
from worker.engine.catalog.checkpoints.library import LAYER, completed, says_untied, with_rotary
from worker.engine.catalog.families import Kind, Slot
from worker.engine.catalog.families.table import OLDER_PARTS
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint
from worker.engine.catalog.primitives.values import Place

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
TIED_BIASES = {"cls.predictions.decoder.bias": "cls.predictions.bias", "lm_head.decoder.bias": "lm_head.bias"}
GENERATING = ("text-generation", "text2text-generation", "automatic-speech-recognition")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Configuration keys of the number of layers in the one list of a decoder or encoder."""
STACK_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_layers"),
}
"""Such keys for the two lists of a model with an encoder and a decoder; the first key that is there counts."""
ENCODER_OR_DECODER = re.compile(r"(\w+\.)?(?P<which>encoder|decoder)\.(layers|layer|block)")
COUNTS = (
    *LAYER_COUNTS, "num_decoder_layers", "encoder_layers", "decoder_layers",
    "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
HARMLESS = frozenset(
    {
        # These say where a checkpoint came from, and how it is stored, loaded and run.
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "torchscript",
        "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "pretraining_tp",
        "gradient_checkpointing", "attn_implementation", "chunk_size_feed_forward",
        # These only matter for training, like everything that is named after dropout.
        "initializer_range", "initializer_factor", "initializer_cutoff_factor", "router_aux_loss_coef",
        "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "problem_type", "finetuning_task",
        # These say how text begins and ends and how it is generated; instruction tuning changes them.
        "bos_token_id", "eos_token_id", "task_specific_params", "max_length", "min_length", "temperature", "top_k",
        "top_p", "do_sample", "num_beams", "repetition_penalty", "prefix", "tokenizer_class",
        # These are seen in shapes, or compared in another way.
        "head_dim", "n_inner", "n_ctx", "label2id", "num_labels", "id2label",
    }
)  # fmt: skip
"""Configuration keys in which merged checkpoints may differ."""
STRUCTURAL = frozenset(
    {"tie_word_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention", "vocab_size", "model_type"}
)
"""Settings that determine the set of tensors, or what they are for."""
OWN = STRUCTURAL | {
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "head_dim", "n_inner",
    "n_ctx",
}  # fmt: skip
"""Settings that a model keeps where another one's settings count: those of its tensors, and of its head."""
LENGTHS = frozenset(
    {
        "sliding_window", "max_window_layers", "attention_chunk_size", "original_max_position_embeddings",
        "max_position_embeddings", "local_attention", "window_size",
    }
)  # fmt: skip
"""Settings that are numbers but show in no shape."""
UNCERTAIN = frozenset({"layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"})
"""Keys of lists over layers, which older versions of transformers left out."""
SETTINGS_ADVICE = (
    "name a model in output.config_from, or as base_model of a recipe of mergekit, whose settings are to count"
)
HARMLESS_BEGINNINGS = ("_", "unsloth_", "summary_")


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


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the length of the one list of layers in the configuration; None where it has none."""
    return next((config[key] for key in LAYER_COUNTS if type(config.get(key)) is int), None)


def slot_of(name: str) -> Slot:
    """Return the slot of a tensor of which nothing but its name is known."""
    layer = layer_of(name)
    return Slot(name, Kind.OTHER, None if layer is None else layer.number, name.endswith("bias"))


def place_of(name: str, stacks: Mapping[str, int]) -> Place:
    """Return a tensor's place: its depth is 0 before the layers and 1 after them, as far as the name tells."""
    layer = layer_of(name)
    if layer is not None:
        count = stacks[layer.stack]
        return Place(name, layer.number / max(1, count - 1), layer.number, count)
    return Place(name, 0.0 if is_before_layers(name) else 1.0)


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers comes before them, as embeddings and their norms do."""
    return not ends_with(name, OUTPUT_EMBEDDINGS) and BEFORE_LAYERS.search(name.lower()) is not None


def is_buffer(tensor: TensorInfo) -> bool:
    """Return whether it is computed from the configuration, not learned: integers, masks, rotary frequencies."""
    if tensor.dtype not in FLOATS or tensor.name.endswith(("rotary_emb.inv_freq", ".masked_bias", "position_ids")):
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


def spellings(name: str) -> tuple[str, ...]:
    """Return a tensor's name, and the other spelling that norms of models converted from TensorFlow may have."""
    module, _, part = name.rpartition(".")
    if not module.endswith("LayerNorm"):
        return (name,)
    others = {**OLDER_PARTS, **{new: old for old, new in OLDER_PARTS.items()}}
    return (name, f"{module}.{others[part]}") if part in others else (name,)


def tied_copies(config: Mapping[str, Any], states: Sequence[Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Return the names of tensors that are second copies, each with its original, which alone is merged.

    `tie_word_embeddings` decides, whether a checkpoint stores the copy or not. If a configuration lacks that key, they
    are tied if not all of `states` store the copy.

    Args:
        states: the tensors of every checkpoint, by the names of the first.
    """
    embeddings = _Embeddings(states)
    tied = _ties(config)
    copies = {}
    for name in dict.fromkeys(name for state in states for name in state):
        if tied if tied is not None else not all(name in state for state in states):
            original = _original(name, states[0], embeddings)
        elif ends_with(name, SHARED_EMBEDDINGS):
            original = embeddings.like(name, EMBEDDINGS[:1])
        else:
            original = None
        if original is not None:
            copies[name] = original
    return copies


def _ties(config: Mapping[str, Any]) -> bool | None:
    """Return whether the configuration ties embeddings; None if it does not say."""
    if config.get("scale_decoder_outputs") is False:  # newer versions of transformers write that T5 1.1 is tied
        return False
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _original(name: str, first: Mapping[str, TensorInfo], embeddings: "_Embeddings") -> str | None:
    if ends_with(name, SHARED_EMBEDDINGS):
        return embeddings.like(name, EMBEDDINGS[:1])
    if ends_with(name, OUTPUT_EMBEDDINGS):
        return embeddings.like(name, EMBEDDINGS)
    for copy, original in TIED_BIASES.items():
        if ends_with(name, (copy,)) and name.removesuffix(copy) + original in first:
            return name.removesuffix(copy) + original
    return None


class _Embeddings:
    """Embedding matrices of the first of `states`, found by their shapes: a header may name any number of them."""

    def __init__(self, states: Sequence[Mapping[str, TensorInfo]]) -> None:
        self._states = states
        self._outer: list[str] | None = None
        self._by_shapes: dict[tuple[str, tuple[int, ...]], dict[tuple[tuple[int, ...], ...], str]] = {}

    def like(self, name: str, endings: Sequence[str]) -> str | None:
        """Return the first matrix that has the shape of `name` wherever `name` is stored; None where there is none."""
        storing = tuple(index for index, state in enumerate(self._states) if name in state)
        shapes = tuple(self._states[index][name].shape for index in storing)
        found = (self._named(ending, storing).get(shapes) for ending in endings)
        return next((other for other in found if other not in (None, name)), None)

    def _named(self, ending: str, storing: tuple[int, ...]) -> dict[tuple[tuple[int, ...], ...], str]:
        """Return the tensors whose names end so, by their shapes in the states at `storing`."""
        if (ending, storing) not in self._by_shapes:
            first = self._states[0]
            if self._outer is None:
                self._outer = [name for name in first if ends_with(name, EMBEDDINGS) and layer_of(name) is None]
            by_shapes: dict[tuple[tuple[int, ...], ...], str] = {}
            for name in self._outer:
                if ends_with(name, (ending,)):
                    shapes = tuple(self._states[index].get(name, first[name]).shape for index in storing)
                    by_shapes.setdefault(shapes, name)
            self._by_shapes[ending, storing] = by_shapes
        return self._by_shapes[ending, storing]


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Return whether a tensor's name ends with one of these, in whole words."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def check_weights(info: CheckpointInfo) -> None:
    """Check the requirements for every checkpoint, also for a base, which is never run.

    Raises:
        InvalidCheckpoint: it has no model_type, is quantised, or has fewer layers than it says.
    """
    require_kind(info)
    packed = next((name for name, tensor in info.tensors.items() if is_packed(tensor)), None)
    if info.config.get("quantization_config") or packed:
        seen = f" (tensor {packed})" if packed else ""
        raise InvalidCheckpoint(info.source, f"its weights are quantised{seen}; merge the originals, then quantise")
    for key, count in _counts(info.config):
        # Building the model makes a module for each layer, and a config is a few bytes that anyone can write.
        if type(count) is not int:
            problem = f"{key} in config.json is no number but of type {type(count).__name__}"
            raise InvalidCheckpoint(info.source, problem)
        if count > len(info.tensors):
            problem = f"config.json says {str(count)[:20]} {key}, and {len(info.tensors)} tensors are there"
            raise InvalidCheckpoint(info.source, problem)
    stacks = stacks_of(info.tensors)
    # Layers that predict further tokens are stored after the others, and only those others are counted.
    predicting = info.config.get("num_nextn_predict_layers")
    beyond = predicting if type(predicting) is int else 0
    for key in LAYER_COUNTS:
        said = info.config.get(key)
        if len(stacks) == 1 and said is not None and not said <= max(stacks.values()) <= said + beyond:
            problem = f"{max(stacks.values())} layers are there, config.json says {said} {key}"
            raise InvalidCheckpoint(info.source, problem)
    if info.config.get("is_encoder_decoder") is not False:
        _check_both_stacks(info, stacks)


def _check_both_stacks(info: CheckpointInfo, stacks: Mapping[str, int]) -> None:
    """Raise InvalidCheckpoint where an encoder and a decoder, and nothing else, have a wrong number of layers."""
    found = {match["which"]: count for stack, count in stacks.items() if (match := ENCODER_OR_DECODER.fullmatch(stack))}
    if len(stacks) != 2 or found.keys() != {"encoder", "decoder"}:
        return
    config = completed(info.config)
    for which, count in found.items():
        key = next((key for key in STACK_COUNTS[which] if type(config.get(key)) is int), None)
        if key is not None and config[key] != count:
            problem = f"{count} layers of its {which} are there, config.json says {config[key]} {key}"
            raise InvalidCheckpoint(info.source, problem)


def check_checkpoint(info: CheckpointInfo) -> None:
    """Check the requirements for every merged checkpoint: those of `check_weights`, and the head that it claims."""
    check_weights(info)
    if _ties(info.config) is False and use_of(info.config).pipeline_tag in GENERATING:
        _check_has_logits(info)


def require_kind(info: CheckpointInfo) -> None:
    if not info.model_type:
        raise InvalidCheckpoint(info.source, "config.json has no model_type; save the model by save_pretrained()")


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in COUNTS and value is not None:
            yield key, value
        if isinstance(value, Mapping):
            yield from _counts(value)


def _check_has_logits(info: CheckpointInfo) -> None:
    """Check that an untied language model has a second matrix with a row for every token, whatever its name is."""
    outer = [tensor for name, tensor in info.tensors.items() if layer_of(name) is None and len(tensor.shape) == 2]
    embeddings = [tensor for tensor in outer if ends_with(tensor.name, EMBEDDINGS)]
    others = [tensor for tensor in outer if not ends_with(tensor.name, (*EMBEDDINGS, *SHARED_EMBEDDINGS))]
    if embeddings and not any(tensor.shape[0] == embeddings[0].shape[0] for tensor in others):
        problem = f"no tensor lm_head.weight, and {says_untied(info.config, 'tie_word_embeddings')}"
        raise InvalidCheckpoint(info.source, problem)


def check_architectures(first: CheckpointInfo, info: CheckpointInfo) -> None:
    """Raise InvalidCheckpoint where one names no architecture at all, IncompatibleCheckpoints where they differ."""
    for one in (first, info):
        require_kind(one)
    ours, theirs = first.model_type, info.model_type
    if ours == theirs:
        ours, theirs = first.architecture, info.architecture
    if ours != theirs:
        raise IncompatibleCheckpoints(first.source, info.source, f"architectures differ: {ours}, {theirs}")


def check_labels(first: CheckpointInfo, info: CheckpointInfo) -> None:
    """Raise IncompatibleCheckpoints where heads that become one have different labels."""
    ours, theirs = labels_of(first.config), labels_of(info.config)
    if ours != theirs:
        names = [", ".join(labels.values())[:200] for labels in (ours, theirs)]
        problem = f"their heads have different labels ({names[0]}; {names[1]}), and one head cannot have both"
        raise IncompatibleCheckpoints(first.source, info.source, problem)


def check_configs(
    first: CheckpointInfo, info: CheckpointInfo, besides: Collection[str] = (), *, settles: bool = False
) -> list[str]:
    """Check that both configurations give the same computation, with defaults for missing keys.

    Args:
        besides: further keys in which they may differ.
        settles: whether they may differ in settings that no shape shows, because a request says whose settings count.

    Returns:
        Such keys, in which they do differ; inner ones after a dot.

    Raises:
        IncompatibleCheckpoints: they differ in another key; the message names it and both values.
    """
    if classifies(first.config) and classifies(info.config):
        check_labels(first, info)
    settled = []
    for key, ours, theirs in differences(completed(first.config), completed(info.config)):
        if key in besides:
            continue
        is_free = shows_in_no_shape(key, ours, theirs)
        if not (settles and is_free):
            advice = f"; {SETTINGS_ADVICE}" if is_free else ""
            problem = f"{key} differs in config.json: {short(ours)}, {short(theirs)}{advice}"
            raise IncompatibleCheckpoints(first.source, info.source, problem)
        settled.append(key)
    for key in UNCERTAIN & _derived_in_one(first.config, info.config) - {*besides}:
        if not settles:
            problem = (
                f"{key} is in one config.json alone, and what its absence means is not known here; save both with the "
                f"same version of transformers, or {SETTINGS_ADVICE}"
            )
            raise IncompatibleCheckpoints(first.source, info.source, problem)
        settled.append(key)
    return settled


def shows_in_no_shape(key: str, ours: object, theirs: object) -> bool:
    """Return whether a setting says how a model computes with its tensors, not which it has and how they are cut."""
    name = key.rpartition(".")[2]
    if name in STRUCTURAL:
        return False
    return name in LENGTHS or not any(type(value) is int for value in (ours, theirs))


def _derived_in_one(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    """Return keys that one configuration has, and that follow in the other from further keys in an unknown way."""
    mine, other = completed(ours), completed(theirs)
    return {key for key in mine.keys() ^ other.keys() if mine.get(key, other.get(key)) is not None}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield keys in which both differ and compute something else, with both values; inner keys after a dot."""
    ours, theirs = with_rotary(ours), with_rotary(theirs)
    harmless = set(HARMLESS)
    for key, condition in CONDITIONS.items():
        if condition(ours) and condition(theirs):
            harmless.add(key)
    for key, mine in ours.items():
        other = theirs.get(key, mine)
        if same(mine, other) or key in harmless or is_of_training(key):
            continue
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from ((f"{key}.{inner}", a, b) for inner, a, b in differences(mine, other))
        else:
            yield key, mine, other


def with_settings_of(
    config: Mapping[str, Any], whose: Mapping[str, Any], besides: Collection[str] = ()
) -> dict[str, Any]:
    """Return the configuration `whose` with the settings of `config` for its own tensors and head.

    Args:
        besides: further keys that `config` keeps.
    """
    own = {*OWN, *besides}
    if not _pads_freely(config):
        own.add("pad_token_id")  # positions may count from it
    found = {key: value for key, value in whose.items() if key not in own}
    found |= {key: value for key, value in config.items() if key in own}
    for key, inner in found.items():
        ours = config.get(key)
        if key not in own and isinstance(inner, Mapping) and isinstance(ours, Mapping) and "model_type" in inner:
            found[key] = with_settings_of(ours, inner)
    return found


def is_of_training(key: str) -> bool:
    """Return whether a configuration's key, by its name, does not change what a model computes."""
    return key.startswith(HARMLESS_BEGINNINGS) or "dropout" in key or key.endswith("pdrop")


def same(ours: object, theirs: object) -> bool:
    """Return whether two values of a configuration are equal; NaN, which Python's JSON allows, equals itself."""
    return ours == theirs or repr(ours) == repr(theirs)


def _reads_positions_alone(config: Mapping[str, Any]) -> bool:
    """Return whether the length for which a model was made does not change what it computes.

    It does with some rotary positions, and shows in the shapes of learned positions.
    """
    rotary = config.get("rope_parameters")
    return not isinstance(rotary, Mapping) or rotary.get("rope_type", "default") in ("default", "linear", "llama3")


def _has_no_window(config: Mapping[str, Any]) -> bool:
    return config.get("use_sliding_window") is False


def _pads_freely(config: Mapping[str, Any]) -> bool:
    """Return whether positions do not count from the padding's id, as they do in RoBERTa."""
    return use_of(config).pipeline_tag == "text-generation" and config.get("model_type") not in COUNT_FROM_PADDING


CONDITIONS = {
    "max_position_embeddings": _reads_positions_alone,
    "sliding_window": _has_no_window,
    "max_window_layers": _has_no_window,
    "pad_token_id": _pads_freely,
}
"""Keys that are harmless if a condition holds for both configurations."""


COUNT_FROM_PADDING = frozenset(
    {
        "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "trocr", "xglm", "xlm-roberta",
        "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Model types with language models whose positions count from the padding's id."""


def is_harmless(key: str) -> bool:
    """Return whether merged checkpoints may differ in the key, wherever it is."""
    return key in HARMLESS or is_of_training(key)


def short(value: object) -> str:
    return repr(value)[:100]
