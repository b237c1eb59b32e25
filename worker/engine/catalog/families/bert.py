"""BERT (Devlin et al. 2019) for sequence classification and regression."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

BERT = Family(
    model_type="bert",
    head=Head("BertForSequenceClassification", ("classifier",), reads_first_token=True),
    prefix="bert.",
    embeddings="bert.embeddings",
    layers="encoder.layer.{layer}",
    layer_modules={
        "attention.self.query": Kind.QUERY,
        "attention.self.key": Kind.KEY,
        "attention.self.value": Kind.VALUE,
        "attention.output.dense": Kind.ATTENTION_OUTPUT,
        "attention.output.LayerNorm": Kind.ATTENTION_NORM,
        "intermediate.dense": Kind.UP,
        "output.dense": Kind.DOWN,
        "output.LayerNorm": Kind.FEED_FORWARD_NORM,
    },
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.token_type_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
        "pooler.dense": Kind.POOLER,  # next-sentence prediction pre-trains it, so experts share its ancestor too
    },
    unread=("embeddings.position_ids",),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "neurons": "intermediate_size",
        "hidden": "hidden_size",
        "positions": "max_position_embeddings",
    },
    settings={"vocab_size": 30522, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    supported={"position_embedding_type": "absolute"},
)
