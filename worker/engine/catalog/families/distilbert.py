"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108) for sequence classification and regression."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

DISTILBERT = Family(
    model_type="distilbert",
    head=Head("DistilBertForSequenceClassification", ("pre_classifier", "classifier"), reads_first_token=True),
    prefix="distilbert.",
    embeddings="distilbert.embeddings",
    layers="transformer.layer.{layer}",
    layer_modules={
        "attention.q_lin": Kind.QUERY,
        "attention.k_lin": Kind.KEY,
        "attention.v_lin": Kind.VALUE,
        "attention.out_lin": Kind.ATTENTION_OUTPUT,
        "sa_layer_norm": Kind.ATTENTION_NORM,
        "ffn.lin1": Kind.UP,
        "ffn.lin2": Kind.DOWN,
        "output_layer_norm": Kind.FEED_FORWARD_NORM,
    },
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
    },
    unread=("embeddings.position_ids",),
    config_names={
        "layers": "n_layers",
        "heads": "n_heads",
        "neurons": "hidden_dim",
        "hidden": "dim",
        "positions": "max_position_embeddings",
    },
    # Sinusoidal positions are only another initialisation: the matrix is saved and loaded like a learned one.
    settings={"vocab_size": 30522, "activation": "gelu"},
    supported={},
)
