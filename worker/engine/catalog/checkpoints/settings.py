"""Checks values of a configuration that no class of transformers takes, so that they are refused before a job begins.

Sizes that shapes of tensors show are checked with the tensors, in `identity`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import (
    ACTIVATIONS,
    ROTARY_UNKNOWN,
    ModelType,
    Refusals,
    activations,
    completed,
    layer_types,
    model_type_of,
    rotary_types,
    state_of,
    type_name,
    value_at,
    value_of,
)
from worker.engine.catalog.primitives.errors import InvalidCheckpoint

DTYPES = frozenset(
    {
        "auto", "float64", "double", "float32", "float", "float16", "half", "bfloat16",
        "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    }
)  # fmt: skip
FUNCTIONS = ("act", "activation", "activation_function")
"""Ends of keys that name a function."""
DROPOUT = re.compile(r"(.*_)?(dropout(_prob|_p|_rate)?|pdrop)")
"""Keys of the share of values that training drops; torch makes no module of one beyond 0 to 1."""
POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len", "max_seq_length",
    "max_sequence_length", "max_source_positions", "max_target_positions",
)  # fmt: skip
MAX_STAGES = 10_000
BUCKETS, DISTANCE = "relative_attention_num_buckets", "relative_attention_max_distance"
"""Numbers of T5's relative positions. Half of the buckets, of an encoder a quarter, are of one distance each; the
others grow by the logarithm of the maximum distance over that number (Raffel et al. 2020, 2.1)."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of the number of experts that a token may be routed to."""
MAX_POSITIONS = 1 << 24  # models compute tables with a row for each; the longest real ones have 10,485,760
PAD_FREELY = frozenset(
    {
        "aimv2", "bark", "bloom", "canine", "clip", "clip_text_model", "clipseg", "codegen", "cpmant", "ctrl",
        "decision_transformer", "falcon", "falcon_mamba", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
        "gpt_neox_japanese", "gptj", "groupvit", "hubert", "imagegpt", "longt5", "mamba", "mamba2", "mpt", "mt5",
        "musicgen_decoder", "musicgen_melody_decoder",
        "nemotron_h", "openai-gpt", "perceiver", "pix2struct", "pop2piano", "rag", "reformer", "rwkv", "sew", "sew-d",
        "siglip", "siglip2", "switch_transformers", "t5", "udop", "umt5", "unispeech", "unispeech-sat", "wav2vec2",
        "wav2vec2-bert", "wav2vec2-conformer", "wavlm", "xlnet", "xlstm",
    }
)  # fmt: skip
"""Kinds of models whose embedding matrix has no row for padding, so that the padding token may have any id."""


def check_settings(info: CheckpointInfo) -> None:
    """Check the types and ranges of a configuration's values, of inner configurations too.

    Raises:
        InvalidCheckpoint: a value is refused; the message names the key.
    """
    for problem in _problems(info.config):
        raise InvalidCheckpoint(info.source, f"config.json has {problem}")


def _problems(config: Mapping[str, Any]) -> list[str]:
    kind = model_type_of(config.get("model_type", ""))
    problems = _problems_of_labels(config)
    for key, value in config.items():
        if isinstance(value, Mapping) and isinstance(value.get("model_type"), str):
            problems += [f"{key} with {problem}" for problem in _problems(value)]
        if key in ("dtype", "torch_dtype") and not (
            value is None or isinstance(value, Mapping) or (isinstance(value, str) and value in DTYPES)
        ):
            problems.append(f"{key} {_short(value)}, which is no dtype of weights; write float32, float16 or bfloat16")
        if key in POSITIONS and type(value) is int and value > MAX_POSITIONS:
            problems.append(f"{key} {_short(value)}; {MAX_POSITIONS} are allowed")
        if key in ("rope_parameters", "rope_scaling") and not isinstance(value, Mapping | None):
            problems.append(f"{key} {_short(value)}, which is no object")
        is_share = DROPOUT.fullmatch(key) is not None and type(value) in (int, float)
        if is_share and not 0 <= value <= 1:
            problems.append(f"{key} {_short(value)}, which is no share from 0 to 1")
        if key == "per_layer_config" and value is not None:
            problems += _problems_of_single_layers(config, value)
        is_epsilon = "norm" in key and key.endswith(("eps", "epsilon")) and value is not None
        if is_epsilon and (type(value) not in (int, float) or not 0 < value < float("inf")):
            what = "text and no number" if isinstance(value, str) else "no positive number"
            problems.append(f"{key} {_short(value)}, which is {what}")
    if kind is None:
        return problems
    fixed = [f"{key}, which transformers works out itself; remove it" for key in config if key in kind.fixed]
    misfits = [*_misfits(config, kind)]
    refused = [] if misfits else refused_values(config, completed(config), kind.refused)
    problems += [*_problems_of_spellings(config, kind), *_problems_of_kind(config, kind)]
    problems += [] if misfits else _problems_of_stages(config, kind)
    return [*problems, *_problems_of_rotary(config, kind), *fixed, *misfits, *refused]


def _problems_of_single_layers(config: Mapping[str, Any], value: Any) -> list[str]:
    """Return what is wrong with the settings of single layers: each may only change a key of the whole model."""
    if not isinstance(value, Mapping) or not all(isinstance(inner, Mapping) for inner in value.values()):
        return [f"per_layer_config {_short(value)}, which does not give layers their settings"]
    known = completed(config)
    keys = {key: number for number, inner in value.items() for key in inner if key not in known}
    return [
        f"per_layer_config with {_short(key)} of layer {_short(number)}, a key that the model has not"
        for key, number in keys.items()
    ]


def _problems_of_rotary(config: Mapping[str, Any], kind: ModelType) -> Iterator[str]:
    """Yield what is wrong with parameters of rotary positions, which every class wants whole, even one without any."""
    default = kind.defaults.get("rope_parameters")
    is_nested = isinstance(default, Mapping) and any(isinstance(part, Mapping) for part in default.values())
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if not isinstance(given, Mapping) or not given:
            continue
        parts = [part for part in given.values() if isinstance(part, Mapping)]
        if is_nested and key == "rope_parameters" and not parts and "rope_parameters" in kind.refused.states:
            yield f"{key} {_short(given)}, which does not say which kind of layers it is of"
        for part in parts or [given]:
            name = part.get("rope_type", part.get("type", "default"))
            if not isinstance(name, str):
                yield f"{key} with rope_type {_short(name)}, which is no text"
                continue
            needed = rotary_types().get(name, ())
            yield from (f"{key} of rope_type {name} without {one}, which it needs" for one in needed if one not in part)
            numbers = ["rope_theta", *needed] if default is not None else []
            for one in numbers:
                if one in part and not one.startswith(("short_", "long_")) and type(part[one]) not in (int, float):
                    yield f"{key} with {one} {_short(part[one])}, which is no number"


def _problems_of_spellings(config: Mapping[str, Any], kind: ModelType) -> Iterator[str]:
    """Yield settings that are given twice, by two spellings of their key, with different values."""
    for alias, key in kind.aliases.items():
        if alias in config and key in config and config[alias] != config[key]:
            yield f"{alias} {_short(config[alias])} and {key} {_short(config[key])}, which are the same setting"


def refused_values(given: Mapping[str, Any], config: Mapping[str, Any], refused: Refusals) -> list[str]:
    """Return values that transformers refuses, each with its key and the reason.

    Args:
        given: the configuration as it is in the file.
        config: the same configuration, completed.
    """
    problems = []
    for key, states in refused.states.items():
        if not has_key(config, key):
            continue
        value = given[key] if key in given else value_at(config, key)
        named = key
        if key == "rope_parameters" and given.get("rope_scaling"):  # which takes its place
            named, value = "rope_scaling", value_at(config, key)
        state = _state_of(value)
        unless = states.get(state)
        if unless is not None and not any(state_of(value_at(config, k)) == one for k, one in unless.items()):
            others = " or ".join(f"another {name}" for name in unless)
            advice = f" without {others}" if unless else ""
            problems.append(f"{named} {_short(value)}, which transformers does not take{advice}")
    for divisor, multiple in refused.divides:
        one, other = value_at(config, divisor), value_at(config, multiple)
        if type(one) is int and type(other) is int and (one == 0 or other % one):
            problems.append(f"{divisor} {one}, which does not divide {multiple} {other}")
    for pairs, is_right in ((refused.counts, int.__eq__), (refused.least, int.__ge__)):
        for key, listed in pairs:
            count, entries = value_at(config, key), value_at(config, listed)
            wanted = len(count) if isinstance(count, list) else count
            if type(wanted) is int and isinstance(entries, list) and not is_right(len(entries), wanted):
                of_list = " entries" if isinstance(count, list) else ""
                problems.append(f"{listed} of {len(entries)} entries, and {key} {wanted}{of_list}")
    for key, rule in refused.equals:
        value, wanted = value_at(config, key), value_of(rule, config)
        if type(value) is int and wanted is not None and value != wanted:
            problems.append(f"{key} {value}, and {rule} is {wanted}")
    for key, words in refused.words.items():
        value = value_at(config, key)
        if not isinstance(value, str):
            continue
        if isinstance(words, str):
            function = value if words == ACTIVATIONS else value.removeprefix("gated-")
            if function not in activations():
                problems.append(f"{key} {_short(value)}, which is no function that transformers knows")
        elif value not in words:
            problems.append(f"{key} {_short(value)}; transformers takes {', '.join(words)}")
    return problems


def has_key(config: Mapping[str, Any], path: str) -> bool:
    """Return whether a configuration has a key, inner ones after a dot."""
    outer, _, key = path.rpartition(".")
    within = value_at(config, outer) if outer else config
    return isinstance(within, Mapping) and key in within


def _state_of(value: Any) -> str:
    state = state_of(value)
    kind = state.removeprefix("rotary ")
    return f"rotary {ROTARY_UNKNOWN}" if state != kind and kind not in rotary_types() else state


def _misfits(config: Mapping[str, Any], kind: ModelType) -> Iterator[str]:
    """Yield the values whose types the class of the configuration refuses."""
    for key, value in config.items():
        taken = kind.types.get(kind.aliases.get(key, key))
        if taken is not None and type_name(value) not in taken:
            yield f"{key} {_short(value)}, which is of type {type_name(value)}; transformers takes {' or '.join(taken)}"
        items = kind.items.get(kind.aliases.get(key, key), ())
        wrong = {type_name(one): one for one in value if type_name(one) not in items} if isinstance(value, list) else {}
        if items and wrong:
            name, one = next(iter(wrong.items()))
            yield f"{key} with {_short(one)}, which is of type {name}; transformers takes {' or '.join(items)}"


def _problems_of_stages(config: Mapping[str, Any], kind: ModelType) -> Iterator[str]:
    """Yield what is wrong with the stages that a backbone is to return, by their names and by their numbers."""
    features, indices = config.get("out_features"), config.get("out_indices")
    count = None if kind.stages is None else value_at(completed(config), kind.stages)
    count = len(count) if isinstance(count, list) else count
    if type(count) is not int or not 0 <= count < MAX_STAGES:
        return
    names = ["stem", *(f"stage{number}" for number in range(1, count + 1))]
    numbers: dict[str, list[int]] = {}
    if isinstance(features, list):
        numbers["out_features"] = [names.index(one) if one in names else len(names) for one in features]
    if isinstance(indices, list):
        numbers["out_indices"] = [
            len(names) if type(one) is not int else one % len(names) if one < 0 else one for one in indices
        ]
    for key, found in numbers.items():
        if any(one >= len(names) for one in found):
            yield f"{key} {_short(config[key])}, and its stages are {names[0]} to {names[-1]} (0 to {count})"
        elif found != sorted({*found}):
            yield f"{key} {_short(config[key])}, which names a stage twice, or not in the order of the stages"
    if len(numbers) == 2 and numbers["out_features"] != numbers["out_indices"]:
        yield f"out_features {_short(features)} and out_indices {_short(indices)}, which are not the same stages"


def _problems_of_labels(config: Mapping[str, Any]) -> list[str]:
    problems = []
    count = config.get("num_labels", 0)
    if type(count) is not int or count < 0:
        problems.append(f"num_labels {_short(count)}, which is no number of labels")
    names = config.get("id2label")
    if names is not None and not (
        isinstance(names, Mapping)
        and all(_is_number(index) and isinstance(name, str | int) for index, name in names.items())
    ):
        problems.append(f"id2label {_short(names)}, which does not give each label's number its name")
    elif names:
        indices = {int(index) for index in names}
        if len(indices) < len(names):
            problems.append(f"id2label {_short(names)}, which names a label twice")
        if "num_labels" in config and count != len(names):  # transformers would then take neither's names
            problems.append(f"num_labels {_short(count)}, and {len(names)} names in id2label; remove what is wrong")
    if config.get("problem_type") == "single_label_classification" and (len(names or ()) or count) == 1:
        problems.append("problem_type single_label_classification, and one label; write regression")
    return problems


def _problems_of_kind(config: Mapping[str, Any], kind: ModelType) -> list[str]:
    problems = []
    known = completed(config)
    for key, default in kind.defaults.items():
        value = known.get(key)
        if key.endswith(FUNCTIONS) and isinstance(default, str) and value is not None and not isinstance(value, str):
            problems.append(f"{key} {_short(value)}, which is no function's name")
    count = kind.aliases.get("num_hidden_layers", "num_hidden_layers")
    types, layers = known.get("layer_types"), known.get(count)
    if types is not None:  # transformers checks it for every class, also for those that do not use it
        if not isinstance(types, list) or not all(isinstance(one, str) for one in types):
            problems.append(f"layer_types {_short(types)}, which is no list of text")
        elif not layer_types().issuperset(types):
            unknown = sorted({*types} - layer_types())
            problems.append(f"layer_types with {_short(unknown[0])}, which is no kind of layer that transformers knows")
        elif "layer_types" in config and type(layers) is int and len(types) != layers:
            problems.append(f"layer_types of {len(types)} layers, and {count} {_short(layers)}")
    buckets, distance = known.get(BUCKETS), known.get(DISTANCE)
    if type(buckets) is int and type(distance) is int and not 2 <= buckets // 2 < distance:
        problem = "half of the buckets must be more than one, and fewer than the distance"
        problems.append(f"{BUCKETS} {buckets} and {DISTANCE} {distance}; {problem}")
    routed = known.get("num_experts_per_tok")
    experts = next((known[key] for key in EXPERTS if type(known.get(key)) is int), 0)
    if type(routed) is int and 0 < experts < routed:  # 0 experts: layers that are no mixtures
        problems.append(f"num_experts_per_tok {routed}, and {experts} experts")
    padding, rows = known.get("pad_token_id"), known.get("vocab_size")
    if padding is not None and type(padding) is not int:
        problems.append(f"pad_token_id {_short(padding)}, which is no token's id")
    elif padding is None or type(rows) is not int or rows < 1 or kind.model_type in PAD_FREELY:
        pass
    elif not -rows <= padding < rows:  # torch counts rows of an embedding from its end too
        problems.append(f"pad_token_id {_short(padding)}, and vocab_size {rows}: the matrix has no such row")
    return problems


def _is_number(index: str) -> bool:
    return index.isascii() and index.removeprefix("-").isdigit()


def _short(value: object) -> str:
    return repr(value)[:100]
