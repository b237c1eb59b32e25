"""CamemBERT (Martin et al. 2020, arXiv 1911.03894): RoBERTa's table, down to the prefix of its tensors."""

from dataclasses import replace

from worker.engine.catalog.families.roberta import ROBERTA

CAMEMBERT = replace(
    ROBERTA,
    model_type="camembert",
    head=replace(ROBERTA.head, architecture="CamembertForSequenceClassification"),
    settings={**ROBERTA.settings, "vocab_size": 30522},
)
