"""Families of architectures. The table of each says what its tensors are; to add a family is one file with a table."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.camembert import CAMEMBERT
from worker.engine.catalog.families.deberta_v2 import DEBERTA_V2
from worker.engine.catalog.families.distilbert import DISTILBERT
from worker.engine.catalog.families.electra import ELECTRA
from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.mpnet import MPNET
from worker.engine.catalog.families.nodes import HEADS, KV_HEADS, NEURONS, NODE_KINDS, NodeKind, ScoreName
from worker.engine.catalog.families.roberta import ROBERTA
from worker.engine.catalog.families.table import Family, Kind, Owner, Site, Slot
from worker.engine.catalog.families.xlm_roberta import XLM_ROBERTA

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA, DEBERTA_V2, MPNET)
}

__all__ = [
    "FAMILIES",
    "HEADS",
    "KV_HEADS",
    "NEURONS",
    "NODE_KINDS",
    "Family",
    "Head",
    "Kind",
    "NodeKind",
    "Owner",
    "ScoreName",
    "Site",
    "Slot",
]
