"""`aligned_regmean`, see its catalog entry: it starts as `regmean`, and then its layers are refitted."""

from worker.engine.merging.layer_alignment import refitted as refit
from worker.engine.merging.methods.regmean import build

__all__ = ["build", "refit"]
