"""Llama (Touvron et al. 2023, arXiv 2302.13971, and its successors)."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import GROUPED_QUERY, Family, Kind, Norms

LLAMA = Family(
    model_type="llama",
    head=Head("LlamaForSequenceClassification", ("score",)),
    prefix="model.",
    embeddings="model.embed_tokens",
    layers="layers.{layer}",
    layer_modules={
        "input_layernorm": Kind.ATTENTION_NORM,
        "self_attn.q_proj": Kind.QUERY,
        "self_attn.k_proj": Kind.KEY,
        "self_attn.v_proj": Kind.VALUE,
        "self_attn.o_proj": Kind.ATTENTION_OUTPUT,
        "post_attention_layernorm": Kind.FEED_FORWARD_NORM,
        "mlp.gate_proj": Kind.GATE,
        "mlp.up_proj": Kind.UP,
        "mlp.down_proj": Kind.DOWN,
    },
    outer_modules={"embed_tokens": Kind.EMBEDDING, "norm": Kind.FINAL_NORM},
    unread=(),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "neurons": "intermediate_size",
        "hidden": "hidden_size",
        "positions": "max_position_embeddings",
    },
    settings={
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
    },
    supported={},
    ownership=GROUPED_QUERY,
    is_causal=True,
    norms=Norms.BEFORE_BLOCKS,
    neuron_vectors=5,
)
