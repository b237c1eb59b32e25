"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a window of attention."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    head=Head("MistralForSequenceClassification", ("score",)),
    absent_sizes={"kv_heads": 8},
    settings={
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 4096,
    },
)
