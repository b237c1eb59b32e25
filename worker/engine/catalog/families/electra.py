"""ELECTRA (Clark et al. 2020, arXiv 2003.10555) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

ELECTRA = Family(
    model_type="electra",
    head=Head("ElectraForSequenceClassification", ("classifier.dense", "classifier.out_proj"), reads_first_token=True),
    prefix="electra.",
    embeddings="electra.embeddings",
    layers=BERT.layers,
    layer_modules=BERT.layer_modules,
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.token_type_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
        "embeddings_project": Kind.EMBEDDING_PROJECTION,  # exists where embedding_size is not hidden_size
    },
    unread=("embeddings.position_ids",),
    config_names=BERT.config_names,
    settings={"vocab_size": 30522, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    supported={"position_embedding_type": "absolute"},
)
