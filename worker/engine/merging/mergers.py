"""Applies a method to the models of a job, and makes the merged backbone in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.planning.stacking import copied_shares
from worker.engine.merging.backbone import Backbone, given
from worker.engine.merging.methods import BUILDERS, REFITS, MeasuredModel, Merger
from worker.engine.merging.methods.average import average
from worker.engine.merging.methods.combine import model_weights
from worker.engine.merging.methods.mask_fisher import node_weights, weight_shares
from worker.engine.merging.refits.comparison import Expert
from worker.engine.merging.token_rows import ByToken
from worker.engine.runtime.device import Precision


def merger_of(method: MethodParameters, models: Sequence[MeasuredModel], plan: MergePlan) -> Merger:
    """Return the method over the models that take part; with slices, over those of each slice.

    Tensors that the base lacks are averaged if the method needs a base.
    """
    merger = _merger_of(method, models, plan)
    without_base = {tensor.slot.name for tensor in plan.backbone if tensor.base is None and tensor.members is None}
    if not method.needs_base or not without_base:
        return merger
    average = weighted_average(models, plan)
    return lambda versions: (average if versions.slot.name in without_base else merger)(versions)


def _merger_of(method: MethodParameters, models: Sequence[MeasuredModel], plan: MergePlan) -> Merger:
    build = BUILDERS[method.name]
    members = {tensor.slot.name: tensor.members for tensor in plan.backbone if tensor.members is not None}
    if not members:
        return build(method, _taking_part(models, plan))
    of_slices = {
        those: build(method, [models[index] for index in those if models[index].takes_part])
        for those in set(members.values())
    }
    return lambda versions: of_slices[members[versions.slot.name]](versions)


def weighted_average(models: Sequence[MeasuredModel], plan: MergePlan) -> Merger:
    """Return the average by the weights of the models that take part, whichever method is used."""
    return average(_taking_part(models, plan))


def mean_shares(method: MethodParameters, models: Sequence[MeasuredModel], plan: MergePlan) -> list[float | None]:
    """Return every model's mean merge weight; None where it is not known."""
    shares = iter(_mean_shares(method, _taking_part(models, plan), plan))
    return [next(shares) if model.takes_part else 0.0 for model in models]


def _taking_part(models: Sequence[MeasuredModel], plan: MergePlan) -> list[MeasuredModel]:
    return [_by_token(model, index, plan) for index, model in enumerate(models) if model.takes_part]


def _mean_shares(method: MethodParameters, models: list[MeasuredModel], plan: MergePlan) -> Sequence[float | None]:
    if method.scoring is not None:  # shares follow from statistics
        return weight_shares(node_weights(models, method.scoring), plan.owned)
    if method.stacked_slices:  # shares follow from the tensors' sources
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
    """Return the plan's model `index` with its statistics at the output's rows; slices have no statistics."""
    if plan.is_of_slices:
        return model
    places = {t.slot.name: t.token_rows.models[index] for t in plan.backbone if t.token_rows is not None}
    return replace(model, fisher=ByToken(model.fisher, places))


def merged_state(
    method: MethodParameters,
    models: Sequence[MeasuredModel],
    experts: Callable[[], Sequence[Expert]],
    plan: MergePlan,
    precision: Precision,
) -> dict[str, Tensor]:
    """Compute the merged backbone in memory.

    Args:
        experts: loads the models that take part, for methods that refit layers to their rows.
    """
    merger = merger_of(method, models, plan)
    takes_part = [model.takes_part for model in models]
    if method.refits_layers:
        start = Backbone(plan, takes_part, merger)
        merger = given(refitted_state(method, start, experts(), precision, lambda: None))
    with (
        Backbone(plan, takes_part, merger, method.distance) as backbone,
        Backbone(replace(plan, base=None), takes_part, weighted_average(models, plan)) as average,
    ):
        return {**backbone.state(), **average.modules()}


def refitted_state(
    method: MethodParameters,
    start: Backbone,
    experts: Sequence[Expert],
    precision: Precision,
    on_group: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the backbone `start`, with its layers refitted to the experts."""
    with start:
        started = start.state()
    return REFITS[method.name](start.plan, started, experts, method, precision, on_group)
