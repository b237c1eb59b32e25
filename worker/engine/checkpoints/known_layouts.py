"""Layouts of the models that are merged most, by their configuration, as transformers builds them.

Building a model to look at its layout takes seconds of imports. Names and shapes are those of the library's table.
This module only knows usual models: a configuration with anything unusual has no layout here, and transformers decides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.engine.catalog.checkpoints.architectures import architecture_of, labels_of
from worker.engine.catalog.checkpoints.library import Architecture, architecture, completed, ties, value_of

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Check = Callable[[object], bool]


@dataclass(frozen=True)
class Layout:
    """The tensors of a model, by the names that it gives them."""

    shapes: dict[str, Shape]
    """Shapes of the parameters; tied ones have the first of their names."""
    tied: dict[str, set[str]]
    """Other names of each tied parameter."""
    buffers: frozenset[str]
    prefix: str
    """Prefix of the model below the head, which names in a checkpoint may lack."""
    unsaved: frozenset[str] = frozenset()
    """Parameters that follow from the configuration, which checkpoints need not have."""

    @property
    def groups(self) -> list[set[str]]:
        """Sets of the names of each tied parameter."""
        return [{name, *others} for name, others in self.tied.items()]


UNTOLD = {
    "q_proj": "head_dim*num_attention_heads",
    "k_proj": "head_dim*num_key_value_heads",
    "v_proj": "head_dim*num_key_value_heads",
    "o_proj": "head_dim*num_attention_heads",
}
"""Lengths by module that the table leaves open: the configurations that it was made from did not tell them apart."""


def known_layout(config: Config, tensors: int) -> Layout | None:
    """Return the layout of a usual model; None where transformers has to be asked.

    Args:
        tensors: number of the checkpoint's tensors; a configuration of more layers than that is unusual.
    """
    model = MODELS.get(architecture_of(config))
    if model is None or config.get("model_type") != model.model_type or len(config["architectures"]) != 1:
        return None
    if not all(key in model.keys and model.keys[key](value) for key, value in config.items()):
        return None
    if not model.sizes <= config.keys() or config[model.layers] > tensors:
        return None
    if not model.fits(config) or not 0 <= (config.get("pad_token_id") or 0) < config["vocab_size"]:
        return None
    found = architecture(config, architecture_of(config))
    return None if found is None else _layout(found, config, config[model.layers])


def _layout(found: Architecture, config: Config, layers: int) -> Layout | None:
    """Return the layout that the table tells; None where it does not tell every shape."""
    full = {**completed(config), "num_labels": len(labels_of(config))}
    if "hidden_size" in full and full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    in_layers = [
        (name.replace("{}", str(number), 1), shape) for number in range(layers) for name, shape in found.layers.items()
    ]
    shapes: dict[str, Shape] = {}
    for name, lengths in (*found.tensors.items(), *in_layers):
        module = name.split(".")[-2]
        shape = [value_of(UNTOLD.get(module) if length is None else length, full) for length in lengths]
        if None in shape:
            return None
        shapes[name] = tuple(length for length in shape if length is not None)
    tied: dict[str, set[str]] = {}
    for copy, original in ties(found, full):
        tied.setdefault(original, set()).add(copy)
    for copy, original, _ in found.ties:
        if copy not in tied.get(original, ()):
            shapes[copy] = shapes[original]
    return Layout(shapes, tied, found.buffers, found.prefix)


# --- values that are usual ------------------------------------------------------------------------------


def is_count(value: object) -> bool:
    return type(value) is int and value > 0


def is_id(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def is_ids(value: object) -> bool:
    return is_id(value) or (isinstance(value, list) and all(type(one) is int and one >= 0 for one in value))


def is_flag(value: object) -> bool:
    return type(value) is bool


def is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e12  # type: ignore[operator]


def is_share(value: object) -> bool:
    return value is None or (type(value) is float and 0 <= value < 1)


def is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def is_labels(value: object) -> bool:
    """Return whether it is a mapping of ids, from 0 on, to names."""
    return (
        isinstance(value, dict)
        and value.keys() == {str(number) for number in range(len(value))}
        and len(value) > 0
        and all(isinstance(name, str) for name in value.values())
    )


def is_label_ids(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) is int and number >= 0 for number in value.values())


def is_rotary(value: object) -> bool:
    """Return whether rotary positions are not scaled, or are scaled as Llama 3's."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    kinds = {"default": {"rope_theta"}, "llama3": LLAMA3_SCALING | ({"rope_theta"} & value.keys())}
    numbers = {key: number for key, number in value.items() if key != "rope_type"}
    wanted = kinds.get(value["rope_type"]) if isinstance(value.get("rope_type"), str) else None
    return numbers.keys() == wanted and all(map(is_number, numbers.values()))


def one_of(*values: object) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def all_full_attention(value: object) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


LLAMA3_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
DTYPE = one_of(None, "float32", "bfloat16", "float16")
COMMON: Mapping[str, Check] = {
    "architectures": lambda value: isinstance(value, list),
    "model_type": is_text,
    "transformers_version": is_text,
    "_name_or_path": is_text,
    "finetuning_task": is_text,
    "unsloth_version": is_text,
    "unsloth_fixed": is_flag,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "use_cache": is_flag,
    "output_past": is_flag,
    "gradient_checkpointing": one_of(False),
    "is_decoder": one_of(False),
    "add_cross_attention": one_of(False),
    "is_encoder_decoder": one_of(False),
    "initializer_range": is_share,
    "id2label": is_labels,
    "label2id": is_label_ids,
    "problem_type": one_of(None, "regression", "single_label_classification", "multi_label_classification"),
    "bos_token_id": is_id,
    "eos_token_id": is_ids,
    "pad_token_id": is_id,
    "tie_word_embeddings": is_flag,
    "vocab_size": is_count,
    "max_position_embeddings": is_count,
    "hidden_size": is_count,
    "num_hidden_layers": is_count,
    "num_attention_heads": is_count,
    "intermediate_size": is_count,
}


# --- the models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One architecture of transformers.

    Args:
        keys: the keys that its configurations may have, each with a check of its value.
        sizes: keys that a configuration must have.
        fits: whether the sizes of a configuration fit each other.
        layers: the key of the number of layers.
    """

    model_type: str
    keys: Mapping[str, Check]
    sizes: frozenset[str]
    fits: Callable[[Config], bool]
    layers: str = "num_hidden_layers"


def has_whole_heads(config: Config) -> bool:
    return bool(config["hidden_size"] % config["num_attention_heads"] == 0)


def has_whole_distilled_heads(config: Config) -> bool:
    return bool(config["dim"] % config["n_heads"] == 0)


def has_padding_position(config: Config) -> bool:
    return has_whole_heads(config) and (config.get("pad_token_id") or 0) < config["max_position_embeddings"]


def has_whole_groups(config: Config) -> bool:
    heads = config["num_attention_heads"]
    counted = len(config.get("layer_types", ())) in (0, config["num_hidden_layers"])
    return has_whole_heads(config) and heads % config.get("num_key_value_heads", heads) == 0 and counted


BERT = {
    **COMMON,
    "type_vocab_size": is_count,
    "hidden_act": one_of("gelu", "relu"),
    "hidden_dropout_prob": is_share,
    "attention_probs_dropout_prob": is_share,
    "layer_norm_eps": is_share,
    "classifier_dropout": is_share,
    "position_embedding_type": one_of("absolute"),
}
DISTILBERT = {
    **COMMON,
    "dim": is_count,
    "hidden_dim": is_count,
    "n_heads": is_count,
    "n_layers": is_count,
    "activation": one_of("gelu", "relu"),
    "sinusoidal_pos_embds": one_of(False),
    "dropout": is_share,
    "attention_dropout": is_share,
    "qa_dropout": is_share,
    "seq_classif_dropout": is_share,
}
LLAMA = {
    **COMMON,
    "num_key_value_heads": is_count,
    "head_dim": is_count,
    "hidden_act": one_of("silu"),
    "rms_norm_eps": is_share,
    "pretraining_tp": one_of(1),
    "attention_bias": one_of(False),
    "attention_dropout": is_share,
    "mlp_bias": one_of(False),
    "rope_theta": is_number,
    "rope_scaling": is_rotary,
    "rope_parameters": is_rotary,
}
MISTRAL = {key: LLAMA[key] for key in LLAMA if key not in ("pretraining_tp", "attention_bias", "mlp_bias")} | {
    "sliding_window": is_id
}
QWEN2 = {key: MISTRAL[key] for key in MISTRAL if key != "head_dim"} | {
    "use_sliding_window": one_of(False),
    "max_window_layers": is_id,
    "layer_types": all_full_attention,
}
QWEN3 = QWEN2 | {"head_dim": is_count, "attention_bias": one_of(False)}

SIZES = frozenset({"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"})
BERT_SIZES = SIZES | {"max_position_embeddings", "type_vocab_size"}
DISTILBERT_SIZES = frozenset({"vocab_size", "max_position_embeddings", "dim", "hidden_dim", "n_heads", "n_layers"})
GROUPED_SIZES = SIZES | {"num_key_value_heads"}


MODELS: Mapping[str, Model] = {
    "BertForSequenceClassification": Model("bert", BERT, BERT_SIZES, has_whole_heads),
    "RobertaForSequenceClassification": Model("roberta", BERT, BERT_SIZES, has_padding_position),
    "XLMRobertaForSequenceClassification": Model("xlm-roberta", BERT, BERT_SIZES, has_padding_position),
    "CamembertForSequenceClassification": Model("camembert", BERT, BERT_SIZES, has_padding_position),
    "DistilBertForSequenceClassification": Model(
        "distilbert", DISTILBERT, DISTILBERT_SIZES, has_whole_distilled_heads, layers="n_layers"
    ),
    "LlamaForCausalLM": Model("llama", LLAMA, SIZES, has_whole_groups),
    "MistralForCausalLM": Model("mistral", MISTRAL, GROUPED_SIZES, has_whole_groups),
    "Qwen2ForCausalLM": Model("qwen2", QWEN2, GROUPED_SIZES, has_whole_groups),
    "Qwen3ForCausalLM": Model("qwen3", QWEN3, GROUPED_SIZES | {"head_dim"}, has_whole_groups),
}
