"""Every merge method: its parameters, formula, source and needs. The arithmetic is in `worker.engine.methods`."""

from worker.engine.catalog.methods.average import AVERAGE, AverageParameters
from worker.engine.catalog.methods.entry import MethodEntry, MethodParameters
from worker.engine.catalog.methods.mask_fisher import MASK_FISHER, MaskFisherParameters

METHODS: dict[str, MethodEntry] = {entry.name: entry for entry in (AVERAGE, MASK_FISHER)}

__all__ = ["METHODS", "AverageParameters", "MaskFisherParameters", "MethodEntry", "MethodParameters"]
