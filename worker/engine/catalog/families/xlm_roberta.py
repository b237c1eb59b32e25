"""XLM-RoBERTa (Conneau et al. 2020, arXiv 1911.02116): RoBERTa's table, down to the prefix of its tensors."""

from dataclasses import replace

from worker.engine.catalog.families.roberta import ROBERTA

XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    head=replace(ROBERTA.head, architecture="XLMRobertaForSequenceClassification"),
    settings={**ROBERTA.settings, "vocab_size": 30522},
)
