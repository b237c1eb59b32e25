"""Every merge method: its parameters, formula, source and needs. The arithmetic is in `worker.engine.methods`."""

from worker.engine.catalog.methods.average import AVERAGE, AverageParameters
from worker.engine.catalog.methods.entry import MeasuringParameters, MethodEntry, MethodParameters, Statistic
from worker.engine.catalog.methods.mask_fisher import MASK_FISHER, MaskFisherParameters, ScoringParameters

METHODS: dict[str, MethodEntry] = {entry.name: entry for entry in (AVERAGE, MASK_FISHER)}

__all__ = [
    "METHODS",
    "AverageParameters",
    "MaskFisherParameters",
    "MeasuringParameters",
    "MethodEntry",
    "MethodParameters",
    "ScoringParameters",
    "Statistic",
]
