"""Which tensor is what, per family of architectures. Adding a family is one file with one table."""

from worker.engine.catalog.families.bert import BERT
from worker.engine.catalog.families.table import Family, Kind, Nodes, Owner, Site, Slot

FAMILIES: dict[str, Family] = {BERT.model_type: BERT}

__all__ = ["FAMILIES", "Family", "Kind", "Nodes", "Owner", "Site", "Slot"]
