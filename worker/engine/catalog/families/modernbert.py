"""ModernBERT (Warner et al. 2024, arXiv 2412.13663) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Fused, Kind, Norms

MODERNBERT = Family(
    model_type="modernbert",
    # It reads the first token, or the mean of all, as each model's own classifier_pooling says.
    head=Head("ModernBertForSequenceClassification", ("head.dense", "head.norm", "classifier")),
    prefix="model.",
    embeddings="model.embeddings",
    layers="layers.{layer}",
    layer_modules={
        "attn_norm": Kind.ATTENTION_NORM,
        "attn.Wqkv": Fused((Kind.QUERY, Kind.KEY, Kind.VALUE)),
        "attn.Wo": Kind.ATTENTION_OUTPUT,
        "mlp_norm": Kind.FEED_FORWARD_NORM,
        "mlp.Wi": Fused((Kind.GATE, Kind.UP)),
        "mlp.Wo": Kind.DOWN,
    },
    outer_modules={
        "embeddings.tok_embeddings": Kind.EMBEDDING,
        "embeddings.norm": Kind.EMBEDDING,
        "final_norm": Kind.FINAL_NORM,
    },
    unread=(),
    config_names=BERT.config_names,
    settings={
        "vocab_size": 50368,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        },
        "local_attention": 128,
        "layer_types": None,  # every layer has the window but one in so many:
        "global_attn_every_n_layers": 3,
        "classifier_activation": "gelu",  # that of heads, also of those that merge
    },
    supported={},
    norms=Norms.BEFORE_BLOCKS,
    absent_in_first_layer=("attn_norm",),  # the norm of the embeddings is just before it
    neuron_vectors=5,
)
