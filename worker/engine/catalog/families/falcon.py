"""Falcon (Almazrouei et al. 2023, arXiv 2311.16867), with rotary positions or ALiBi."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import GROUPED_QUERY, Family, Fused, Kind, Norms


@dataclass(frozen=True)
class _Falcon(Family):
    def size(self, config: Mapping[str, Any], what: str) -> int:
        """Return a size as `Family.size`; `num_kv_heads` counts in the newer architecture alone."""
        if what == "kv_heads" and not self.setting(config, "new_decoder_architecture"):
            return 1 if self.setting(config, "multi_query") else self.size(config, "heads")
        return super().size(config, what)


FALCON = _Falcon(
    model_type="falcon",
    head=Head("FalconForSequenceClassification", ("score",)),
    prefix="transformer.",
    embeddings="transformer.word_embeddings",
    layers="h.{layer}",
    layer_modules={
        "input_layernorm": Kind.ATTENTION_NORM,
        "ln_attn": Kind.ATTENTION_NORM,
        "self_attention.query_key_value": Fused((Kind.QUERY, Kind.KEY, Kind.VALUE), by_head=True),
        "self_attention.dense": Kind.ATTENTION_OUTPUT,
        "post_attention_layernorm": Kind.FEED_FORWARD_NORM,
        "ln_mlp": Kind.FEED_FORWARD_NORM,
        "mlp.dense_h_to_4h": Kind.UP,
        "mlp.dense_4h_to_h": Kind.DOWN,
    },
    outer_modules={"word_embeddings": Kind.EMBEDDING, "ln_f": Kind.FINAL_NORM},
    unread=(),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_kv_heads",
        "neurons": "ffn_hidden_size",
        "hidden": "hidden_size",
        "positions": "max_position_embeddings",
    },
    widening=4,
    settings={
        "vocab_size": 65024,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
    },
    supported={},
    ownership=GROUPED_QUERY,
    is_causal=True,
    norms=Norms.PARALLEL,
    norms_where={"new_decoder_architecture": (True, Norms.PARALLEL), "parallel_attn": (False, Norms.BEFORE_BLOCKS)},
)
