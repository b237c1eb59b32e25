"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219): Llama with fused matrices."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA
from worker.engine.catalog.families.table import Fused, Kind

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    head=Head("Phi3ForSequenceClassification", ("score",)),
    layer_modules={
        "input_layernorm": Kind.ATTENTION_NORM,
        "self_attn.qkv_proj": Fused((Kind.QUERY, Kind.KEY, Kind.VALUE)),
        "self_attn.o_proj": Kind.ATTENTION_OUTPUT,
        "post_attention_layernorm": Kind.FEED_FORWARD_NORM,
        "mlp.gate_up_proj": Fused((Kind.GATE, Kind.UP)),
        "mlp.down_proj": Kind.DOWN,
    },
    settings={
        "vocab_size": 32064,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
)
