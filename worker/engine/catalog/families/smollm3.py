"""SmolLM3 (Hugging Face 2025): Llama in which some layers have no rotary positions."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    head=Head("SmolLM3ForSequenceClassification", ("score",)),
    absent_sizes={"kv_heads": 4},
    settings={
        "vocab_size": 128256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 2000000.0, "rope_type": "default"},
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": None,  # follows from the next, as do the types of the layers from both and the window
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
    },
)
