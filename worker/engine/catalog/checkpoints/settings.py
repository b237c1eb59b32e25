"""Checks values of a configuration that no class of transformers takes, so that they are refused before a job begins.

Sizes that shapes of tensors show are checked with the tensors, in `identity`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.library import ModelType, completed, model_type_of, type_name
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
MAX_POSITIONS = 1 << 24  # models compute tables with a row for each; the longest real ones have 10,485,760
PAD_FREELY = frozenset(
    {
        "aimv2", "bark", "bloom", "canine", "clip", "clip_text_model", "clipseg", "codegen", "cpmant", "ctrl",
        "decision_transformer", "falcon", "falcon_mamba", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
        "gpt_neox_japanese", "gptj", "groupvit", "hubert", "imagegpt", "longt5", "mamba", "mamba2", "mpt", "mt5",
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
        is_epsilon = "norm" in key and key.endswith(("eps", "epsilon")) and value is not None
        if is_epsilon and (type(value) not in (int, float) or not 0 < value < float("inf")):
            what = "text and no number" if isinstance(value, str) else "no positive number"
            problems.append(f"{key} {_short(value)}, which is {what}")
    return [*problems, *(_problems_of_kind(config, kind) if kind else ()), *(_misfits(config, kind) if kind else ())]


def _misfits(config: Mapping[str, Any], kind: ModelType) -> Iterator[str]:
    """Yield the values whose types the class of the configuration refuses."""
    for key, value in config.items():
        taken = kind.types.get(kind.aliases.get(key, key))
        if taken is not None and type_name(value) not in taken:
            yield f"{key} {_short(value)}, which is of type {type_name(value)}; transformers takes {' or '.join(taken)}"


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
    types, layers = known.get("layer_types"), known.get("num_hidden_layers")
    if types is not None:  # transformers checks it for every class, also for those that do not use it
        if not isinstance(types, list) or not all(isinstance(one, str) for one in types):
            problems.append(f"layer_types {_short(types)}, which is no list of text")
        elif "layer_types" in config and type(layers) is int and len(types) != layers:
            problems.append(f"layer_types of {len(types)} layers, and num_hidden_layers {_short(layers)}")
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
