"""Qwen2 and Qwen2.5 (Qwen Team 2024, arXiv 2407.10671): Llama with biases of queries, keys and values."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA

WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
"""Settings of windows of attention. Where `layer_types` is missing, it follows from the others."""

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    head=Head("Qwen2ForSequenceClassification", ("score",)),
    absent_sizes={"kv_heads": 32},
    settings={
        "vocab_size": 151936,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        **WINDOWS,
    },
)
