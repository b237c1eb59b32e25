"""Gemma 3 without its vision tower (Gemma Team 2025, arXiv 2503.19786): Gemma 2 with norms of queries and keys."""

from dataclasses import replace

from worker.engine.catalog.families.gemma2 import GEMMA2
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Kind

GEMMA3_TEXT = replace(
    GEMMA2,
    model_type="gemma3_text",
    head=Head("Gemma3TextForSequenceClassification", ("score",)),
    layer_modules={
        **GEMMA2.layer_modules,
        "self_attn.q_norm": Kind.QUERY_NORM,  # one for all heads, as wide as one of them
        "self_attn.k_norm": Kind.KEY_NORM,
    },
    # transformers' attention of Gemma 3 does not read `attn_logit_softcapping`.
    settings={
        "vocab_size": 262208,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
        "layer_types": None,  # every layer has the window but one in so many:
        "sliding_window_pattern": 6,
    },
    supported={"use_bidirectional_attention": False},
    hidden_vectors=24,
    attention_rows=1,
)
