"""Layouts of the models that are merged most, by their configuration, as transformers builds them.

Building a model to look at its layout takes seconds of imports. This module only knows usual models: a configuration
with anything unusual has no layout here, and transformers decides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.engine.catalog.checkpoints.architectures import architecture_of, labels_of

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
    shapes = model.shapes(config)
    if shapes is None or not 0 <= (config.get("pad_token_id") or 0) < config["vocab_size"]:
        return None
    tied = {}
    if model.ties and config.get("tie_word_embeddings", False):
        del shapes[OUTPUT]
        tied = {INPUT: {OUTPUT}}
    return Layout(shapes, tied, frozenset(model.buffers), model.prefix)


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
        shapes: makes the shapes of tensors from a configuration; None where it fits no such model.
    """

    model_type: str
    prefix: str
    keys: Mapping[str, Check]
    sizes: frozenset[str]
    shapes: Callable[[Config], dict[str, Shape] | None]
    buffers: tuple[str, ...]
    layers: str = "num_hidden_layers"
    ties: bool = False


def linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bert_shapes(config: Config) -> dict[str, Shape] | None:
    hidden = config["hidden_size"]
    if hidden % config["num_attention_heads"]:
        return None
    return {
        **_embeddings("bert", config, ("word", "position", "token_type")),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
        **_encoder("bert", config),
        **linear("bert.pooler.dense", hidden, hidden),
        **linear("classifier", len(labels_of(config)), hidden),
    }


def roberta_shapes(config: Config) -> dict[str, Shape] | None:
    hidden = config["hidden_size"]
    if hidden % config["num_attention_heads"] or (config.get("pad_token_id") or 0) >= config["max_position_embeddings"]:
        return None
    return {
        **_embeddings("roberta", config, ("word", "token_type")),
        **norm("roberta.embeddings.LayerNorm", hidden),
        **_embeddings("roberta", config, ("position",)),
        **_encoder("roberta", config),
        **linear("classifier.dense", hidden, hidden),
        **linear("classifier.out_proj", len(labels_of(config)), hidden),
    }


def _embeddings(prefix: str, config: Config, kinds: tuple[str, ...]) -> dict[str, Shape]:
    rows = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    return {
        f"{prefix}.embeddings.{kind}_embeddings.weight": (config[rows[kind]], config["hidden_size"]) for kind in kinds
    }


def _encoder(prefix: str, config: Config) -> dict[str, Shape]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, Shape] = {}
    for number in range(config["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= linear(f"{layer}.intermediate.dense", inner, hidden)
        shapes |= linear(f"{layer}.output.dense", hidden, inner)
        shapes |= norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


def distilbert_shapes(config: Config) -> dict[str, Shape] | None:
    hidden, inner = config["dim"], config["hidden_dim"]
    if hidden % config["n_heads"]:
        return None
    shapes: dict[str, Shape] = {
        "distilbert.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "distilbert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        **norm("distilbert.embeddings.LayerNorm", hidden),
    }
    for number in range(config["n_layers"]):
        layer = f"distilbert.transformer.layer.{number}"
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= linear(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= norm(f"{layer}.sa_layer_norm", hidden)
        shapes |= linear(f"{layer}.ffn.lin1", inner, hidden)
        shapes |= linear(f"{layer}.ffn.lin2", hidden, inner)
        shapes |= norm(f"{layer}.output_layer_norm", hidden)
    return {
        **shapes,
        **linear("pre_classifier", hidden, hidden),
        **linear("classifier", len(labels_of(config)), hidden),
    }


def decoder_shapes(*, biased: bool = False, norms_heads: bool = False) -> Callable[[Config], dict[str, Shape] | None]:
    """Make the function that gives shapes of Llama and similar decoders.

    Args:
        biased: whether query, key and value have biases.
        norms_heads: whether queries and keys have norms.
    """

    def shapes(config: Config) -> dict[str, Shape] | None:
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        shared = config.get("num_key_value_heads", heads)
        if (
            hidden % heads
            or heads % shared
            or len(config.get("layer_types", ())) not in (0, config["num_hidden_layers"])
        ):
            return None
        width = config.get("head_dim") or hidden // heads
        found: dict[str, Shape] = {INPUT: (config["vocab_size"], hidden)}
        for number in range(config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            for part, outputs in (("q_proj", heads * width), ("k_proj", shared * width), ("v_proj", shared * width)):
                found |= linear(f"{layer}.self_attn.{part}", outputs, hidden)
                if not biased:
                    del found[f"{layer}.self_attn.{part}.bias"]
            found[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * width)
            if norms_heads:
                found |= {f"{layer}.self_attn.{part}_norm.weight": (width,) for part in "qk"}
            found[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
            found[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
            found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
            found[f"{layer}.input_layernorm.weight"] = (hidden,)
            found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        return {**found, "model.norm.weight": (hidden,), OUTPUT: (config["vocab_size"], hidden)}

    return shapes


INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")

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


def _encoder_buffers(prefix: str) -> tuple[str, str]:
    return f"{prefix}.embeddings.position_ids", f"{prefix}.embeddings.token_type_ids"


MODELS: Mapping[str, Model] = {
    "BertForSequenceClassification": Model("bert", "bert", BERT, BERT_SIZES, bert_shapes, _encoder_buffers("bert")),
    "RobertaForSequenceClassification": Model(
        "roberta", "roberta", BERT, BERT_SIZES, roberta_shapes, _encoder_buffers("roberta")
    ),
    "XLMRobertaForSequenceClassification": Model(
        "xlm-roberta", "roberta", BERT, BERT_SIZES, roberta_shapes, _encoder_buffers("roberta")
    ),
    "CamembertForSequenceClassification": Model(
        "camembert", "roberta", BERT, BERT_SIZES, roberta_shapes, _encoder_buffers("roberta")
    ),
    "DistilBertForSequenceClassification": Model(
        "distilbert",
        "distilbert",
        DISTILBERT,
        DISTILBERT_SIZES,
        distilbert_shapes,
        ("distilbert.embeddings.position_ids",),
        layers="n_layers",
    ),
    "LlamaForCausalLM": Model("llama", "model", LLAMA, SIZES, decoder_shapes(), BUFFERS, ties=True),
    "MistralForCausalLM": Model("mistral", "model", MISTRAL, GROUPED_SIZES, decoder_shapes(), BUFFERS, ties=True),
    "Qwen2ForCausalLM": Model("qwen2", "model", QWEN2, GROUPED_SIZES, decoder_shapes(biased=True), BUFFERS, ties=True),
    "Qwen3ForCausalLM": Model(
        "qwen3",
        "model",
        QWEN3,
        GROUPED_SIZES | {"head_dim"},
        decoder_shapes(norms_heads=True),
        BUFFERS,
        ties=True,
    ),
}
