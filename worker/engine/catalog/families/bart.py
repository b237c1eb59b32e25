"""BART (Lewis et al. 2020, arXiv 1910.13461), an encoder and a decoder with norms after the sums."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.nodes import DECODER
from worker.engine.catalog.families.table import WITH_CROSS_ATTENTION, Family, Kind, Stack

ENCODER_MODULES = {
    "self_attn.q_proj": Kind.QUERY,
    "self_attn.k_proj": Kind.KEY,
    "self_attn.v_proj": Kind.VALUE,
    "self_attn.out_proj": Kind.ATTENTION_OUTPUT,
    "self_attn_layer_norm": Kind.ATTENTION_NORM,
    "fc1": Kind.UP,
    "fc2": Kind.DOWN,
    "final_layer_norm": Kind.FEED_FORWARD_NORM,
}
BART = Family(
    model_type="bart",
    # It reads the decoder's output at the last end token of the row.
    head=Head("BartForSequenceClassification", ("classification_head.dense", "classification_head.out_proj")),
    prefix="model.",
    embeddings="model.shared",
    layers="encoder.layers.{layer}",
    layer_modules=ENCODER_MODULES,
    decoder=Stack(
        DECODER,
        "decoder.layers.{layer}",
        {
            **ENCODER_MODULES,
            "encoder_attn.q_proj": Kind.CROSS_QUERY,
            "encoder_attn.k_proj": Kind.CROSS_KEY,
            "encoder_attn.v_proj": Kind.CROSS_VALUE,
            "encoder_attn.out_proj": Kind.CROSS_ATTENTION_OUTPUT,
            "encoder_attn_layer_norm": Kind.CROSS_ATTENTION_NORM,
        },
    ),
    outer_modules={
        "shared": Kind.EMBEDDING,
        "encoder.embed_tokens": Kind.EMBEDDING,
        "decoder.embed_tokens": Kind.EMBEDDING,
        "encoder.embed_positions": Kind.EMBEDDING,  # with two more rows than positions; the first token has the third
        "decoder.embed_positions": Kind.EMBEDDING,
        "encoder.layernorm_embedding": Kind.EMBEDDING,
        "decoder.layernorm_embedding": Kind.EMBEDDING,
    },
    unread=(),
    config_names={
        "layers": "encoder_layers",
        "decoder_layers": "decoder_layers",
        "heads": "encoder_attention_heads",
        "decoder_heads": "decoder_attention_heads",
        "neurons": "encoder_ffn_dim",
        "decoder_neurons": "decoder_ffn_dim",
        "hidden": "d_model",
        "positions": "max_position_embeddings",
    },
    settings={
        "vocab_size": 50265,
        "activation_function": "gelu",
        "scale_embedding": False,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
    },
    supported={"is_encoder_decoder": True},
    ownership=WITH_CROSS_ATTENTION,
    hidden_vectors=24,  # of a decoder's layer, which attends twice
    attention_rows=2,
)
