"""MPNet (Song et al. 2020, arXiv 2004.09297) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

MPNET = Family(
    model_type="mpnet",
    head=Head("MPNetForSequenceClassification", ("classifier.dense", "classifier.out_proj"), reads_first_token=True),
    prefix="mpnet.",
    embeddings="mpnet.embeddings",
    layers="encoder.layer.{layer}",
    layer_modules={
        "attention.attn.q": Kind.QUERY,
        "attention.attn.k": Kind.KEY,
        "attention.attn.v": Kind.VALUE,
        "attention.attn.o": Kind.ATTENTION_OUTPUT,
        "attention.LayerNorm": Kind.ATTENTION_NORM,
        "intermediate.dense": Kind.UP,
        "output.dense": Kind.DOWN,
        "output.LayerNorm": Kind.FEED_FORWARD_NORM,
    },
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
        "encoder.relative_attention_bias": Kind.EMBEDDING,  # (buckets, heads), one for all layers
    },
    unread=("embeddings.position_ids",),
    config_names=BERT.config_names,
    settings={"vocab_size": 30527, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    # transformers computes with these two values, whatever the configuration says.
    supported={"pad_token_id": 1, "relative_attention_num_buckets": 32},
    padding_position="pad_token_id",
)
