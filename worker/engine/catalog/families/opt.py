"""OPT (Zhang et al. 2022, arXiv 2205.01068)."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind, Norms

OPT = Family(
    model_type="opt",
    head=Head("OPTForSequenceClassification", ("score",)),
    prefix="model.",
    embeddings="model.decoder.embed_tokens",
    layers="decoder.layers.{layer}",
    layer_modules={
        "self_attn_layer_norm": Kind.ATTENTION_NORM,
        "self_attn.q_proj": Kind.QUERY,
        "self_attn.k_proj": Kind.KEY,
        "self_attn.v_proj": Kind.VALUE,
        "self_attn.out_proj": Kind.ATTENTION_OUTPUT,
        "final_layer_norm": Kind.FEED_FORWARD_NORM,
        "fc1": Kind.UP,
        "fc2": Kind.DOWN,
    },
    outer_modules={
        "decoder.embed_tokens": Kind.EMBEDDING,
        "decoder.embed_positions": Kind.EMBEDDING,  # with two more rows than positions; the first token has the third
        "decoder.project_in": Kind.EMBEDDING_PROJECTION,
        "decoder.final_layer_norm": Kind.FINAL_NORM,
        "decoder.project_out": Kind.OUTPUT_PROJECTION,
    },
    unread=(),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "neurons": "ffn_dim",
        "hidden": "hidden_size",
        "positions": "max_position_embeddings",
    },
    settings={
        "vocab_size": 50272,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    supported={},
    is_causal=True,
    norms=Norms.BEFORE_BLOCKS,
    norms_where={"do_layer_norm_before": (False, Norms.AFTER_SUMS)},
)
