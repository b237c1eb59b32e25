"""What a plan's tensors say against a recipe's parameters."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from worker.engine.catalog.methods import MethodParameters
from worker.engine.catalog.planning import MergePlan
from worker.engine.catalog.values import DEFAULT_WEIGHT, PerTensor, filters_of, value_at


def unmatched_filters(plan: MergePlan, field: str, setting: object) -> Iterator[tuple[str, str]]:
    """(field, problem) of every filter of what may be a `PerTensor` parameter that no merged tensor matches."""
    names = [tensor.slot.name for tensor in plan.backbone]
    for index, entry in enumerate(filters_of(setting)):
        if not any(fnmatchcase(name, entry.filter) for name in names):
            problem = f"'{entry.filter}' matches no tensor that is merged; one of them is {names[len(names) // 2]}"
            yield f"{field}.{index}.filter", problem


def parameter_problems(
    plan: MergePlan,
    method: MethodParameters,
    weights: Sequence[PerTensor[float]] = (),
    of_models: Sequence[Mapping[str, PerTensor[float]]] = (),
) -> Iterator[tuple[str, str]]:
    """(field of the request, problem): filters that match nothing, and a tensor for which all `weights` are 0.

    Args:
        of_models: each model's own values of the method's parameters.
    """
    for name in type(method).model_fields:
        yield from unmatched_filters(plan, f"method.{name}", getattr(method, name))
    for index, weight in enumerate(weights):
        yield from unmatched_filters(plan, f"models.{index}.weight", weight)
    for index, own in enumerate(of_models):
        for name, setting in own.items():
            yield from unmatched_filters(plan, f"models.{index}.parameters.{name}", setting)
    for tensor in plan.backbone if weights else ():
        if not any(value_at(weight, tensor.place, DEFAULT_WEIGHT) > 0 for weight in weights):
            yield "models", f"the weights of all models are 0 for tensor {tensor.slot.name}; one must be positive"
            return
