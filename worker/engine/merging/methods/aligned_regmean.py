"""`aligned_regmean`, see its catalog entry: a merge by another method, whose layers are then refitted."""

from worker.engine.merging.layer_alignment import refitted as refit
from worker.engine.merging.methods.starting import build

__all__ = ["build", "refit"]
