"""Combines the configurations' settings of single layers when layers are stacked anew.

Lists with an entry for each layer are put together like the layers. Lists of numbers of layers are numbered anew. A
count of first layers is counted anew. A rule by layer number, such as "every fourth", stays only where every layer
keeps its place in that rule. Whatever cannot be decided is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker.engine.catalog.checkpoints.config_differences import HARMLESS
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.weights import LAYER_COUNTS, layer_count
from worker.engine.catalog.primitives.errors import IncompatibleCheckpoints, InvalidCheckpoint

LayerSource = tuple[int, int]
"""The position of a checkpoint, and the number of one of its layers."""

PER_LAYER = re.compile(
    r".*(layer|block|attn|attention|mlp|ffn|rope|window|pattern|heads|theta|intermediate|multiplier).*|sliding.*"
)
"""Names of lists that have an entry for each layer, if they are as long as there are layers."""
NUMBERS = re.compile(
    r"(.*(layer|block|attn|attention)s?_(ids?|indices|indexes|index|idxs?)|mlp_only_layers|moe_layers|dense_layers"
    r"|cross_attention_layers|global_layers|(full|global)_?att\w*_(idxs|indexes|indices))"
)
"""Names of lists of numbers of layers."""
FIRST = frozenset({"first_k_dense_replace", "num_dense_layers", "num_first_dense_layers", "max_window_layers"})
"""Keys that count the first layers, where these are of another kind than those after them."""
SHARING = "hybrid_layer_ids"
"""Numbers of layers of Zamba that have one attention together, stored with the first of them, and adapters for each."""
PERIOD = "block_types"
"""Kinds of layers that RecurrentGemma repeats; of as many as there are layers, each is that of one layer."""
RULES: Mapping[str, str | None] = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": None,
    "decoder_sparse_step": "mlp_layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_interval": "mlp_layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "layer_group_size": "layer_types",
    "hybrid_layer_interval": None,
}
"""Keys of periods of layer kinds, each with the list of kinds by layer that takes precedence over it."""
UNSAID: Mapping[str, int] = {
    "gemma2": 2, "vaultgemma": 2, "gpt_oss": 2, "gpt_neo": 2, "cohere2": 4, "exaone4": 4, "qwen3_next": 4, "gemma3": 6,
    "gemma3_text": 6, "modernbert": 3, "olmo3": 4, "gemma3n_text": 5, "gemma4_text": 6, "smollm3": 4, "llama4_text": 4,
}  # fmt: skip
"""Period of layer kinds by `model_type`, where neither a list nor a period is in the configuration."""
SUPERSEDED = {"first_k_dense_replace": "mlp_layer_types", "max_window_layers": "layer_types"}


def keys_of_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that follow from the number of layers, or that describe each layer."""
    numbers = [key for key, value in config.items() if isinstance(value, list) and NUMBERS.fullmatch(key)]
    return list(dict.fromkeys([*LAYER_COUNTS, *lists_of_layers(config), *numbers, *FIRST, *_nested(config)]))


def stacked_config(
    first: CheckpointInfo, sources: Sequence[LayerSource], checkpoints: Sequence[CheckpointInfo]
) -> dict[str, Any]:
    """Return the first model's configuration with the new layers: their number, and the sources' settings of each.

    Args:
        sources: the source of each layer of the result.

    Raises:
        InvalidCheckpoint: a setting cannot be combined; the message names it.
        IncompatibleCheckpoints: a model lacks a setting of its layers that another has.
    """
    stacked = dict(first.config)
    as_it_was = [number for _, number in sources] == list(range(layer_count(first.config) or 0))
    if as_it_was and all(checkpoints[model].config == first.config for model, _ in sources):
        return stacked
    if SHARING in first.config and not as_it_was:
        problem = f"the layers of {SHARING} in config.json share tensors, so they cannot be put together anew"
        raise InvalidCheckpoint(first.source, problem)
    for key in LAYER_COUNTS:
        if key in stacked:
            stacked[key] = len(sources)
    of_each = lists_of_layers(first.config)
    for key in of_each:
        said = [_said(first, checkpoints[model], key, number) for model, number in sources]
        stacked[key] = "".join(said) if isinstance(first.config[key], str) else said
    for key, value in first.config.items():
        if key in of_each or key in HARMLESS:
            continue
        if key == "attention_types":  # GPT-Neo has kinds, and how often they return
            stacked[key] = [[[_expanded(checkpoints[model], key)[number] for model, number in sources], 1]]
        elif key == PERIOD and isinstance(value, list) and value:
            stacked[key] = [_in_period(first, checkpoints[model], number) for model, number in sources]
        elif isinstance(value, list) and NUMBERS.fullmatch(key):
            named = [checkpoints[model].config.get(key) for model, _ in sources]
            stacked[key] = [
                place
                for place, ((_, number), numbers) in enumerate(zip(sources, named, strict=True))
                if isinstance(numbers, list) and number in numbers
            ]
        elif key in FIRST and type(value) is int:
            _count_anew(first, key, sources, checkpoints, stacked)
        elif key in RULES and type(value) is int:
            _check_rule(first, key, value, sources)
        else:
            _check_known(first, key, value)
    unsaid = UNSAID.get(first.model_type)
    said_otherwise = [key for key in (*RULES, "layer_types", "attention_types") if first.config.get(key) is not None]
    if unsaid is not None and not said_otherwise:
        _check_rule(first, f"model_type {first.model_type}", unsaid, sources)
    return stacked


def lists_of_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values describe every layer; a text may do so by its letters."""
    count = layer_count(config)
    found = []
    for key, value in config.items():
        letters = isinstance(value, str) and key.endswith("_pattern")
        has_one_for_each = (letters or isinstance(value, list)) and len(value) == count
        if has_one_for_each and key not in HARMLESS and PER_LAYER.fullmatch(key) and not NUMBERS.fullmatch(key):
            found.append(key)
    return found


def _nested(config: Mapping[str, Any]) -> list[str]:
    return [key for key in ("attention_types",) if key in config]


def _said(first: CheckpointInfo, info: CheckpointInfo, key: str, number: int) -> Any:
    said = info.config.get(key)
    if not isinstance(said, list | str) or number >= len(said):
        problem = f"{key} in config.json of the second says nothing of layer {number}"
        raise IncompatibleCheckpoints(first.source, info.source, problem)
    return said[number]


def _in_period(first: CheckpointInfo, info: CheckpointInfo, number: int) -> Any:
    period = info.config.get(PERIOD)
    if not isinstance(period, list) or not period:
        raise IncompatibleCheckpoints(
            first.source, info.source, f"{PERIOD} in config.json of the second names no kinds"
        )
    return period[number % len(period)]


def _expanded(info: CheckpointInfo, key: str) -> list[Any]:
    count, found = layer_count(info.config), []
    value = info.config.get(key)
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and type(entry[1]) is int:
            found += entry[0] * min(entry[1], 1000)
    if len(found) != count:
        raise InvalidCheckpoint(info.source, f"{key} in config.json says nothing of each of its {count} layers")
    return found


def _count_anew(
    first: CheckpointInfo,
    key: str,
    sources: Sequence[LayerSource],
    checkpoints: Sequence[CheckpointInfo],
    stacked: dict[str, Any],
) -> None:
    counts = [checkpoints[model].config.get(key) for model, _ in sources]
    is_first = [type(count) is int and number < count for count, (_, number) in zip(counts, sources, strict=True)]
    count = sum(is_first)
    if is_first == sorted(is_first, reverse=True):
        stacked[key] = count
    elif SUPERSEDED.get(key) not in first.config:
        problem = f"{key} in config.json counts first layers, and the slices would have such layers after others"
        raise InvalidCheckpoint(first.source, problem)


def _check_rule(first: CheckpointInfo, key: str, period: int, sources: Sequence[LayerSource]) -> None:
    """Check that every layer has the kind that the rule gives to its new number."""
    instead = RULES.get(key)
    if period < 2 or (instead is not None and first.config.get(instead)):
        return
    for place, (_, number) in enumerate(sources):
        if (place - number) % period:
            problem = (
                f"its layers are of kinds that return after {period} ({key}), and layer {number} would become layer "
                f"{place}, of another kind; let slices start and end at multiples of {period}"
            )
            raise InvalidCheckpoint(first.source, problem)


def _check_known(first: CheckpointInfo, key: str, value: Any) -> None:
    """Refuse a setting that may describe layers in a way that is not known."""
    problem = None
    if isinstance(value, list) and len(value) == layer_count(first.config) and not key.endswith("token_id"):
        problem = "has as many entries as there are layers"
    elif isinstance(value, list) and value and "layer" in key and all(type(one) is int for one in value):
        problem = "may have numbers of layers"
    elif key == "num_kv_shared_layers" and value:
        problem = "counts last layers that share what those before them compute"
    elif isinstance(value, Mapping) and "layer" in key and any(str(inner).isdecimal() for inner in value):
        problem = "says something of single layers"
    if problem is not None:
        advice = "how it would be of other layers is not known"
        raise InvalidCheckpoint(first.source, f"{key} in config.json {problem}, and {advice}")
