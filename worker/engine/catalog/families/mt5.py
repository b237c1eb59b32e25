"""mT5 (Xue et al. 2021, arXiv 2010.11934): T5 1.1 for many languages, with a vocabulary of its own."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.t5 import T5

MT5 = replace(
    T5,
    model_type="mt5",
    head=Head("MT5ForSequenceClassification", ("classification_head.dense", "classification_head.out_proj")),
    settings={
        **T5.settings,
        "vocab_size": 250112,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
)
