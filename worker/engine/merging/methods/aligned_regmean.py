"""`aligned_regmean`, see its catalog entry: a merge by another method, whose layers are then refitted."""

from worker.engine.merging.methods.starting import build
from worker.engine.merging.refits.layer_alignment import refitted as refit

__all__ = ["build", "refit"]
