"""Qwen3 (Qwen Team 2025, arXiv 2505.09388): Qwen2 with norms of each head's query and key, and without biases."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.qwen2 import QWEN2
from worker.engine.catalog.families.table import Kind

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    head=Head("Qwen3ForSequenceClassification", ("score",)),
    layer_modules={
        **QWEN2.layer_modules,
        "self_attn.q_norm": Kind.QUERY_NORM,  # one for all heads, as wide as one of them
        "self_attn.k_norm": Kind.KEY_NORM,
    },
    absent_sizes={"kv_heads": 32, "head_size": 128},
    settings={**QWEN2.settings, "attention_bias": False},
    hidden_vectors=20,
)
