"""Compares the configurations of checkpoints that are merged, with defaults for missing keys."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from worker.engine.catalog.checkpoints.architectures import labels_of, use_of
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import completed, model_type_of, with_rotary
from worker.engine.catalog.checkpoints.weights import require_kind
from worker.engine.catalog.families import backbone_of
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints

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
    {
        "tie_word_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention", "vocab_size", "model_type",
        "classifier_activation",
    }
)  # fmt: skip
"""Settings that determine the set of tensors, or what they are for."""
OWN = STRUCTURAL | {
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "head_dim", "n_inner",
    "n_ctx", "classifier_bias", "classifier_pooling", "pooler_hidden_act",
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


def _may_classify(info: CheckpointInfo) -> bool:
    """Return whether the head's outputs are labels, as they may be if transformers does not have the class."""
    kind = model_type_of(info.model_type)
    return kind is None or info.architecture not in kind.architectures or use_of(info.config).has_labels


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
    if _may_classify(first) and _may_classify(info):
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
    harmless = HARMLESS | {key for key in CONDITIONS if is_idle(key, ours, theirs)}
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
    model_type = str(config.get("model_type"))
    backbone = backbone_of(model_type)
    counts = model_type in COUNT_FROM_PADDING if backbone is None else backbone.padding_position is not None
    return use_of(config).pipeline_tag == "text-generation" and not counts


CONDITIONS = {
    "max_position_embeddings": _reads_positions_alone,
    "sliding_window": _has_no_window,
    "max_window_layers": _has_no_window,
    "pad_token_id": _pads_freely,
}
"""Keys that are harmless if a condition holds for both configurations."""
COUNT_FROM_PADDING = frozenset({"data2vec-text", "roberta-prelayernorm", "trocr", "xglm", "xlm-roberta-xl", "xmod"})
"""Model types without a table whose language models count positions from the padding's id."""


def is_idle(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Return whether two models compute the same whatever their values of the key, by the rest of their settings."""
    condition = CONDITIONS.get(key)
    return condition is not None and condition(ours) and condition(theirs)


def is_harmless(key: str) -> bool:
    """Return whether merged checkpoints may differ in the key, wherever it is."""
    return key in HARMLESS or is_of_training(key)


def short(value: object) -> str:
    return repr(value)[:100]
