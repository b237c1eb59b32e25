"""OLMo 2 (OLMo Team 2024, arXiv 2501.00656): Llama with norms after its blocks, and of all queries and all keys."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA
from worker.engine.catalog.families.nodes import HEADS, KV_HEADS
from worker.engine.catalog.families.table import GROUPED_QUERY, Kind, Norms, Ownership

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    head=Head("Olmo2ForSequenceClassification", ("score",)),
    layer_modules={
        "self_attn.q_proj": Kind.QUERY,
        "self_attn.k_proj": Kind.KEY,
        "self_attn.v_proj": Kind.VALUE,
        "self_attn.q_norm": Kind.QUERY_NORM,  # as wide as all heads together
        "self_attn.k_norm": Kind.KEY_NORM,
        "self_attn.o_proj": Kind.ATTENTION_OUTPUT,
        "post_attention_layernorm": Kind.ATTENTION_NORM,
        "mlp.gate_proj": Kind.GATE,
        "mlp.up_proj": Kind.UP,
        "mlp.down_proj": Kind.DOWN,
        "post_feedforward_layernorm": Kind.FEED_FORWARD_NORM,
    },
    settings={
        "vocab_size": 50304,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
    },
    ownership=Ownership(
        rows={**GROUPED_QUERY.rows, Kind.QUERY_NORM: HEADS, Kind.KEY_NORM: KV_HEADS}, columns=GROUPED_QUERY.columns
    ),
    norms=Norms.AFTER_BLOCKS,
    hidden_vectors=20,
)
