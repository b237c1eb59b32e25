"""ALBERT (Lan et al. 2020, arXiv 1909.11942) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

ALBERT = Family(
    model_type="albert",
    head=Head("AlbertForSequenceClassification", ("classifier",), reads_first_token=True),
    prefix="albert.",
    embeddings="albert.embeddings",
    layers="encoder.albert_layer_groups.{layer}.albert_layers.0",
    layer_modules={
        "attention.query": Kind.QUERY,
        "attention.key": Kind.KEY,
        "attention.value": Kind.VALUE,
        "attention.dense": Kind.ATTENTION_OUTPUT,
        "attention.LayerNorm": Kind.ATTENTION_NORM,
        "ffn": Kind.UP,
        "ffn_output": Kind.DOWN,
        "full_layer_layer_norm": Kind.FEED_FORWARD_NORM,
    },
    outer_modules={
        "embeddings.word_embeddings": Kind.EMBEDDING,
        "embeddings.position_embeddings": Kind.EMBEDDING,
        "embeddings.token_type_embeddings": Kind.EMBEDDING,
        "embeddings.LayerNorm": Kind.EMBEDDING,
        "encoder.embedding_hidden_mapping_in": Kind.EMBEDDING_PROJECTION,
        "pooler": Kind.POOLER,  # pre-trained on the order of sentences
    },
    unread=("embeddings.position_ids",),
    config_names={**BERT.config_names, "layers": "num_hidden_groups", "uses": "num_hidden_layers"},
    settings={"vocab_size": 30000, "hidden_act": "gelu_new", "layer_norm_eps": 1e-12},
    # One layer has all weights. Several groups would each be run in a part of the uses.
    supported={"num_hidden_groups": 1, "inner_group_num": 1, "position_embedding_type": "absolute"},
    neuron_vectors=7,  # gelu_new is computed in steps
)
