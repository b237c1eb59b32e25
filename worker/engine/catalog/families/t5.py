"""T5 (Raffel et al. 2020, arXiv 1910.10683), and FLAN-T5: no biases, norms first, relative positions as biases."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.nodes import DECODER
from worker.engine.catalog.families.table import WITH_CROSS_ATTENTION, Family, Kind, Norms, Stack

ATTENTION = {
    "layer.0.layer_norm": Kind.ATTENTION_NORM,
    "layer.0.SelfAttention.q": Kind.QUERY,
    "layer.0.SelfAttention.k": Kind.KEY,
    "layer.0.SelfAttention.v": Kind.VALUE,
    "layer.0.SelfAttention.o": Kind.ATTENTION_OUTPUT,
}
POSITIONS = "block.0.layer.0.SelfAttention.relative_attention_bias"


def feed_forward(layer: int) -> dict[str, Kind]:
    """Return the modules of a feed-forward layer, plain or gated."""
    return {
        f"layer.{layer}.layer_norm": Kind.FEED_FORWARD_NORM,
        f"layer.{layer}.DenseReluDense.wi": Kind.UP,
        f"layer.{layer}.DenseReluDense.wi_0": Kind.GATE,
        f"layer.{layer}.DenseReluDense.wi_1": Kind.UP,
        f"layer.{layer}.DenseReluDense.wo": Kind.DOWN,
    }


T5 = Family(
    model_type="t5",
    # It reads the decoder's output at the last end token of the row.
    head=Head("T5ForSequenceClassification", ("classification_head.dense", "classification_head.out_proj")),
    prefix="transformer.",
    embeddings="transformer.shared",
    layers="encoder.block.{layer}",
    layer_modules={**ATTENTION, **feed_forward(1)},
    decoder=Stack(
        DECODER,
        "decoder.block.{layer}",
        {
            **ATTENTION,
            "layer.1.layer_norm": Kind.CROSS_ATTENTION_NORM,
            "layer.1.EncDecAttention.q": Kind.CROSS_QUERY,
            "layer.1.EncDecAttention.k": Kind.CROSS_KEY,
            "layer.1.EncDecAttention.v": Kind.CROSS_VALUE,
            "layer.1.EncDecAttention.o": Kind.CROSS_ATTENTION_OUTPUT,
            **feed_forward(2),
        },
    ),
    outer_modules={
        "shared": Kind.EMBEDDING,
        "encoder.embed_tokens": Kind.EMBEDDING,
        "decoder.embed_tokens": Kind.EMBEDDING,
        # The first layer has the biases of all layers, a column for each head's place, whichever layer it is in.
        f"encoder.{POSITIONS}": Kind.EMBEDDING,
        f"decoder.{POSITIONS}": Kind.EMBEDDING,
        "encoder.final_layer_norm": Kind.FINAL_NORM,
        "decoder.final_layer_norm": Kind.FINAL_NORM,
    },
    unread=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    config_names={
        "layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "heads": "num_heads",
        "head_size": "d_kv",
        "neurons": "d_ff",
        "hidden": "d_model",
        "positions": "n_positions",
    },
    # With relative positions any length would run, but no longer one was trained; newer configurations do not say it.
    absent_sizes={"positions": 512, "head_size": 64},
    settings={
        "vocab_size": 32128,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "decoder_start_token_id": None,
        "eos_token_id": 1,
    },
    supported={"is_encoder_decoder": True},
    ownership=WITH_CROSS_ATTENTION,
    norms=Norms.BEFORE_BLOCKS,
    hidden_vectors=24,  # of a decoder's layer, which attends twice
    neuron_vectors=7,  # gelu_new is computed in steps
    attention_rows=4,
)
