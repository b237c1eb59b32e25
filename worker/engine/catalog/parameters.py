"""What a plan's tensors say against a recipe's parameters."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain, islice

from worker.engine.catalog.methods import AutoParameters, BaseParameters
from worker.engine.catalog.planning import MergePlan
from worker.engine.catalog.values import DEFAULT_WEIGHT, PerTensor, filters_of, values_at

MOST_PROBLEMS = 10  # that are told at once


def parameter_problems(
    plan: MergePlan,
    method: BaseParameters,
    weights: Sequence[PerTensor[float]] = (),
    of_models: Sequence[Mapping[str, PerTensor[float]]] = (),
) -> Iterator[tuple[str, str]]:
    """(field of the request, problem): filters that match nothing, and a tensor for which all `weights` are 0.

    At most `MOST_PROBLEMS` of them.

    Args:
        of_models: each model's own values of the method's parameters.
    """
    settings: dict[str, object] = {}
    for number, one in enumerate(method.methods):
        field = f"method.candidates.{number}" if isinstance(method, AutoParameters) else "method"
        settings |= {f"{field}.{name}": getattr(one, name) for name in type(one).model_fields}
    settings |= {f"models.{index}.weight": weight for index, weight in enumerate(weights)}
    for index, own in enumerate(of_models):
        settings |= {f"models.{index}.parameters.{name}": setting for name, setting in own.items()}
    yield from islice(chain(_unmatched(plan, settings), _weightless(plan, weights)), MOST_PROBLEMS)


def _unmatched(plan: MergePlan, settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(field, problem) of every filter, in what may be `PerTensor` parameters by field, that matches no tensor."""
    names = [tensor.slot.name for tensor in plan.backbone]
    matched: dict[str, bool] = {}
    for field, setting in settings.items():
        for index, entry in enumerate(filters_of(setting)):
            pattern = entry.filter
            if pattern not in matched:
                matched[pattern] = any(fnmatchcase(name, pattern) for name in names)
            if not matched[pattern]:
                problem = f"'{pattern}' matches no tensor that is merged; one of them is {names[len(names) // 2]}"
                yield f"{field}.{index}.filter", problem


def _weightless(plan: MergePlan, weights: Sequence[PerTensor[float]]) -> Iterator[tuple[str, str]]:
    """The first tensor for which all weights are 0."""
    for tensor in plan.backbone if weights else ():
        if not any(weight > 0 for weight in values_at(weights, tensor.place, DEFAULT_WEIGHT)):
            yield "models", f"the weights of all models are 0 for tensor {tensor.slot.name}; one must be positive"
            return
