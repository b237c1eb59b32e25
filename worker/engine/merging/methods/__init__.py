"""The arithmetic of every merge method: pure functions over the versions of one tensor.

A method is built once per merge by its `build` and then called for each backbone tensor.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from worker.engine.catalog.methods import METHODS, MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.merging.layer_alignment import Expert
from worker.engine.merging.methods import (
    aligned_regmean,
    arcee_fusion,
    average,
    breadcrumbs,
    dare,
    della,
    fisher,
    karcher,
    linear,
    mask_fisher,
    mask_regmean,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
from worker.engine.merging.methods.blocks import MeasuredModel, Merger
from worker.engine.runtime.device import Precision

Build = Callable[[MethodParameters, list[MeasuredModel]], Merger]
Refit = Callable[
    [MergePlan, Mapping[str, Tensor], Sequence[Expert], MethodParameters, Precision, Callable[[], None]],
    dict[str, Tensor],
]
"""Refits the layers of a merged backbone to the experts; calls back after each group of layers."""

BUILDERS: Mapping[str, Build] = {
    "average": average.build,
    "mask_fisher": mask_fisher.build,
    "task_arithmetic": task_arithmetic.build,
    "ties": ties.build,
    "linear": linear.build,
    "slerp": slerp.build,
    "nuslerp": nuslerp.build,
    "multislerp": multislerp.build,
    "karcher": karcher.build,
    "dare_linear": dare.build,
    "dare_ties": dare.build,
    "della": della.build,
    "della_linear": della.build,
    "breadcrumbs": breadcrumbs.build,
    "breadcrumbs_ties": breadcrumbs.build,
    "model_stock": model_stock.build,
    "sce": sce.build,
    "ram": ram.build,
    "ramplus_tl": ram.build,
    "nearswap": nearswap.build,
    "arcee_fusion": arcee_fusion.build,
    "fisher": fisher.build,
    "regmean": regmean.build,
    "mask_regmean": mask_regmean.build,
    "aligned_regmean": aligned_regmean.build,
    "passthrough": passthrough.build,
}

REFITS: Mapping[str, Refit] = {"aligned_regmean": aligned_regmean.refit}
"""By name, of methods whose `refits_layers` is true: what is made of the merge that `BUILDERS` begins with."""

if BUILDERS.keys() != METHODS.keys():
    raise ImportError(f"catalog and arithmetic disagree on the methods: {BUILDERS.keys() ^ METHODS.keys()}")

__all__ = ["BUILDERS", "REFITS", "Build", "MeasuredModel", "Merger", "Refit", "average"]
