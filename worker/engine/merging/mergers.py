"""A method over the models of a job, and the backbone that it makes in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.stacking import copied_shares
from worker.engine.jobs.preparing import ModelRun, required_dataset
from worker.engine.merging.backbone import Backbone, given
from worker.engine.merging.layer_alignment import Expert
from worker.engine.merging.methods import BUILDERS, REFITS, MeasuredModel, Merger, average
from worker.engine.merging.methods.combine import model_weights
from worker.engine.merging.methods.mask_fisher import node_weights, weight_shares
from worker.engine.merging.token_rows import ByToken
from worker.engine.models.loading import ModelCache
from worker.engine.runtime.device import Precision


def merger_of(method: MethodParameters, runs: Sequence[ModelRun], plan: MergePlan) -> Merger:
    """The method over the models that take part; of slices, over those of each.

    What the base has no tensor for is averaged where the method needs one.
    """
    merger = _merger_of(method, runs, plan)
    without_base = {tensor.slot.name for tensor in plan.backbone if tensor.base is None and tensor.members is None}
    if not method.needs_base or not without_base:
        return merger
    average = weighted_average(runs, plan)
    return lambda versions: (average if versions.slot.name in without_base else merger)(versions)


def _merger_of(method: MethodParameters, runs: Sequence[ModelRun], plan: MergePlan) -> Merger:
    build = BUILDERS[method.name]
    members = {tensor.slot.name: tensor.members for tensor in plan.backbone if tensor.members is not None}
    if not members:
        return build(method, _taking_part(runs, plan))
    of_slices = {
        those: build(method, [runs[index].as_measured for index in those if runs[index].takes_part])
        for those in set(members.values())
    }
    return lambda versions: of_slices[members[versions.slot.name]](versions)


def weighted_average(runs: Sequence[ModelRun], plan: MergePlan) -> Merger:
    """The average by the weights of the models that take part, whatever the method."""
    return average.average(_taking_part(runs, plan))


def mean_shares(method: MethodParameters, runs: Sequence[ModelRun], plan: MergePlan) -> list[float | None]:
    """Every model's mean merge weight; None where it is not known."""
    shares = iter(_mean_shares(method, _taking_part(runs, plan), plan))
    return [next(shares) if run.takes_part else 0.0 for run in runs]


def _taking_part(runs: Sequence[ModelRun], plan: MergePlan) -> list[MeasuredModel]:
    return [_by_token(run.as_measured, index, plan) for index, run in enumerate(runs) if run.takes_part]


def _mean_shares(method: MethodParameters, models: list[MeasuredModel], plan: MergePlan) -> Sequence[float | None]:
    if method.scoring is not None:  # by what was measured
        return weight_shares(node_weights(models, method.scoring), plan.owned)
    if method.stacked_slices:  # by the tensors' sources
        return copied_shares(plan)
    if plan.is_of_slices:
        return [None] * len(models)
    of_tensors = []
    for tensor in plan.backbone:
        shares = method.shares(model_weights(models, tensor.place).tolist(), tensor.place)
        if shares is None:
            return [None] * len(models)
        of_tensors.append(shares)
    sizes = torch.tensor([math.prod(tensor.shape) for tensor in plan.backbone], dtype=torch.float64)
    mean: list[float] = (sizes @ torch.tensor(of_tensors, dtype=torch.float64) / sizes.sum()).tolist()
    return mean


def _by_token(model: MeasuredModel, index: int, plan: MergePlan) -> MeasuredModel:
    """What was measured of the plan's model `index`, at the output's rows; of slices nothing is measured."""
    if plan.is_of_slices:
        return model
    places = {t.slot.name: t.token_rows.models[index] for t in plan.backbone if t.token_rows is not None}
    return replace(model, fisher=ByToken(model.fisher, places))


def merged_state(
    method: MethodParameters, runs: list[ModelRun], plan: MergePlan, models: ModelCache, precision: Precision
) -> dict[str, Tensor]:
    """The merged backbone, in memory."""
    merger = merger_of(method, runs, plan)
    if method.refits_layers:
        merger = given(refitted_state(method, merger, runs, plan, models, precision, lambda: None))
    with Backbone(plan, [run.takes_part for run in runs], merger, method.distance) as backbone:
        return backbone.state()


def refitted_state(
    method: MethodParameters,
    start: Merger,
    runs: list[ModelRun],
    plan: MergePlan,
    models: ModelCache,
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """The backbone that `start` makes, with its layers refitted to the models that take part."""
    experts = [
        Expert(models.get(run.info), run.spec.weight, run.unseen, required_dataset(run.spec).source)
        for run in runs
        if run.takes_part
    ]
    with Backbone(plan, [run.takes_part for run in runs], start) as backbone:
        started = backbone.state()
    return REFITS[method.name](plan, started, experts, method, precision, on_group)
