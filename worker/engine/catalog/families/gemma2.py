"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): norms before and after blocks, windows, and bounded logits."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA
from worker.engine.catalog.families.table import Kind, Norms

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    head=Head("Gemma2ForSequenceClassification", ("score",)),
    layer_modules={
        **LLAMA.layer_modules,
        "post_attention_layernorm": Kind.ATTENTION_NORM,
        "pre_feedforward_layernorm": Kind.FEED_FORWARD_NORM,
        "post_feedforward_layernorm": Kind.FEED_FORWARD_NORM,
    },
    absent_sizes={"kv_heads": 4, "head_size": 256},
    settings={
        "vocab_size": 256000,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,  # every other layer has the window
    },
    supported={"use_bidirectional_attention": None},
    norms=Norms.AFTER_BLOCKS,
    hidden_vectors=20,
    attention_rows=2,
)
