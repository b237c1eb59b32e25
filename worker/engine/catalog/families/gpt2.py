"""GPT-2 (Radford et al. 2019), whose weights are stored as (inputs, outputs)."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Fused, Kind, Norms

GPT2 = Family(
    model_type="gpt2",
    head=Head("GPT2ForSequenceClassification", ("score",)),
    prefix="transformer.",
    embeddings="transformer.wte",
    layers="h.{layer}",
    layer_modules={
        "ln_1": Kind.ATTENTION_NORM,
        "attn.c_attn": Fused((Kind.QUERY, Kind.KEY, Kind.VALUE), transposed=True),
        "attn.c_proj": Fused((Kind.ATTENTION_OUTPUT,), transposed=True),
        "ln_2": Kind.FEED_FORWARD_NORM,
        "mlp.c_fc": Fused((Kind.UP,), transposed=True),
        "mlp.c_proj": Fused((Kind.DOWN,), transposed=True),
    },
    outer_modules={"wte": Kind.EMBEDDING, "wpe": Kind.EMBEDDING, "ln_f": Kind.FINAL_NORM},
    unread=("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias"),
    config_names={
        "layers": "n_layer",
        "heads": "n_head",
        "neurons": "n_inner",
        "hidden": "n_embd",
        "positions": "n_positions",
    },
    widening=4,
    settings={
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    supported={"add_cross_attention": False},
    is_causal=True,
    norms=Norms.BEFORE_BLOCKS,
)
