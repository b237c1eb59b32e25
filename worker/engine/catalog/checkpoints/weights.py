"""Checks that a checkpoint has the weights that its configuration claims, as far as no class is known."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from worker.engine.catalog.checkpoints.architectures import use_of
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.inspection import is_packed
from worker.engine.catalog.checkpoints.library import completed, says_untied
from worker.engine.catalog.checkpoints.tensor_names import EMBEDDINGS, SHARED_EMBEDDINGS, ends_with, layer_of, stacks_of
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

GENERATING = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Configuration keys of the number of layers in the one list of a decoder or encoder."""
LAYER_KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Configuration keys of the kind of every layer; Nemotron-H has no other key that tells their number."""
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


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Return the length of the one list of layers in the configuration; None where it has none."""
    counts = (config[key] for key in LAYER_COUNTS if type(config.get(key)) is int)
    lengths = (len(config[key]) for key in LAYER_KINDS if isinstance(config.get(key), list | str))
    return next(counts, next(lengths, None))


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
    if ties_embeddings(info.config) is False and use_of(info.config).auto_class in GENERATING:
        _check_has_logits(info)


def require_kind(info: CheckpointInfo) -> None:
    """Raise InvalidCheckpoint where the configuration does not say what kind of model it is of."""
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


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Return whether the configuration ties embeddings; None if it does not say."""
    if config.get("scale_decoder_outputs") is False:  # newer versions of transformers write that T5 1.1 is tied
        return False
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
