"""CamemBERT (Martin et al. 2020, arXiv 1911.03894): RoBERTa's table, down to the prefix of its tensors."""

from dataclasses import replace

from worker.engine.catalog.families.roberta import ROBERTA

CAMEMBERT = replace(
    ROBERTA,
    model_type="camembert",
    architectures=("CamembertForSequenceClassification",),
    settings={**ROBERTA.settings, "vocab_size": 30522},
)
