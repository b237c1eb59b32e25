"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

ROBERTA = Family(
    model_type="roberta",
    head=Head("RobertaForSequenceClassification", ("classifier.dense", "classifier.out_proj"), reads_first_token=True),
    prefix="roberta.",
    embeddings="roberta.embeddings",
    layers=BERT.layers,
    layer_modules=BERT.layer_modules,
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.token_type_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
    },
    # Before 4.0, transformers built a pooler that the classification head never read: roberta-large-mnli has one.
    unread=("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"),
    config_names=BERT.config_names,
    settings={"vocab_size": 50265, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 1},
    supported={"position_embedding_type": "absolute"},
    padding_position="pad_token_id",
)
