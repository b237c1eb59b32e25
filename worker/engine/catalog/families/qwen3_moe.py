"""Qwen3's mixtures of experts (Qwen Team 2025, arXiv 2505.09388)."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.mixtral import DENSE, MIXTRAL, MIXTURE, STACKED
from worker.engine.catalog.families.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    head=Head("Qwen3MoeForSequenceClassification", ("score",)),
    layer_modules={**{name: kind for name, kind in QWEN3.layer_modules.items() if name not in DENSE}, **MIXTURE},
    stacked=STACKED,
    config_names={**MIXTRAL.config_names, "neurons": "moe_intermediate_size"},
    spellings=MIXTRAL.spellings,
    absent_sizes={"kv_heads": 4},
    settings={
        "vocab_size": 151936,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "use_sliding_window": False,
        "sliding_window": 4096,
        "attention_bias": False,
        "norm_topk_prob": False,
    },
    supported={"decoder_sparse_step": 1, "mlp_only_layers": ()},  # every layer is a mixture
)
