"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Fused, Kind, Norms

GPT_NEOX = Family(
    model_type="gpt_neox",
    head=Head("GPTNeoXForSequenceClassification", ("score",)),
    prefix="gpt_neox.",
    embeddings="gpt_neox.embed_in",
    layers="layers.{layer}",
    layer_modules={
        "input_layernorm": Kind.ATTENTION_NORM,
        "attention.query_key_value": Fused((Kind.QUERY, Kind.KEY, Kind.VALUE), by_head=True),
        "attention.dense": Kind.ATTENTION_OUTPUT,
        "post_attention_layernorm": Kind.FEED_FORWARD_NORM,
        "mlp.dense_h_to_4h": Kind.UP,
        "mlp.dense_4h_to_h": Kind.DOWN,
    },
    outer_modules={"embed_in": Kind.EMBEDDING, "final_layer_norm": Kind.FINAL_NORM},
    unread=(
        "layers.{layer}.attention.bias",
        "layers.{layer}.attention.masked_bias",
        "layers.{layer}.attention.rotary_emb.inv_freq",
    ),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "neurons": "intermediate_size",
        "hidden": "hidden_size",
        "positions": "max_position_embeddings",
    },
    settings={
        "vocab_size": 50432,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"},
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    supported={},
    is_causal=True,
    norms=Norms.PARALLEL,
    norms_where={"use_parallel_residual": (False, Norms.BEFORE_BLOCKS)},
)
