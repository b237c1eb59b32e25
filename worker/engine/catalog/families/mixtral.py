"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with mixtures of experts for feed-forward layers."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.mistral import MISTRAL
from worker.engine.catalog.families.table import Kind

DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MIXTURE = {
    "mlp.gate": Kind.ROUTER,
    "mlp.experts.{expert}.gate_proj": Kind.GATE,
    "mlp.experts.{expert}.up_proj": Kind.UP,
    "mlp.experts.{expert}.down_proj": Kind.DOWN,
}
STACKED = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj",),
}
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    head=Head("MixtralForSequenceClassification", ("score",)),
    layer_modules={**{name: kind for name, kind in MISTRAL.layer_modules.items() if name not in DENSE}, **MIXTURE},
    stored_modules={
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.{expert}.gate_proj": "block_sparse_moe.experts.{expert}.w1",
        "mlp.experts.{expert}.up_proj": "block_sparse_moe.experts.{expert}.w3",
        "mlp.experts.{expert}.down_proj": "block_sparse_moe.experts.{expert}.w2",
    },
    stacked=STACKED,
    config_names={
        **MISTRAL.config_names,
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    spellings={"num_local_experts": "num_experts"},
    settings={
        "vocab_size": 32000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
    },
)
