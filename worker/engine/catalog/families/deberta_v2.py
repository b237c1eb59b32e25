"""DeBERTa v2 and v3 (He et al. 2021, arXiv 2006.03654, 2111.09543) for sequence classification and regression."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind

DEBERTA_V2 = Family(
    model_type="deberta-v2",
    head=Head("DebertaV2ForSequenceClassification", ("pooler.dense", "classifier"), reads_first_token=True),
    prefix="deberta.",
    embeddings="deberta.embeddings",
    layers="encoder.layer.{layer}",
    layer_modules={
        "attention.self.query_proj": Kind.QUERY,
        "attention.self.key_proj": Kind.KEY,
        "attention.self.value_proj": Kind.VALUE,
        # A head's own view of the relative positions, where share_att_key is false.
        "attention.self.pos_query_proj": Kind.POSITION,
        "attention.self.pos_key_proj": Kind.POSITION,
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
        "embeddings.embed_proj": Kind.EMBEDDING_PROJECTION,
        "embeddings.LayerNorm": Kind.EMBEDDING,
        "encoder.rel_embeddings": Kind.EMBEDDING,
        "encoder.LayerNorm": Kind.EMBEDDING,  # norm of the relative positions, not of a layer
        "encoder.conv.conv": Kind.CONVOLUTION,
        "encoder.conv.LayerNorm": Kind.CONVOLUTION,
    },
    # Unlike BERT's, the pooler is not pre-trained: each fine-tuning draws its own, so two of them have no ancestor in
    # common and a mean of them makes no sense. It stays with the classifier that was trained on it.
    unread=("embeddings.position_ids",),
    # With relative positions alone any length would run, but no longer one was ever trained.
    config_names=BERT.config_names,
    settings={
        "vocab_size": 128100,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-7,
        "position_biased_input": True,
        "relative_attention": False,
        "max_relative_positions": -1,
        "position_buckets": -1,
        "pos_att_type": (),
        "norm_rel_ebd": ("none",),
        "share_att_key": False,
        "conv_kernel_size": 0,
        "conv_groups": 1,
        "conv_act": "tanh",
    },
    supported={},
    attention_rows=5,  # includes scores of tokens with positions, and of positions with tokens
)
