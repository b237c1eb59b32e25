"""Checks a recipe's parameters against a plan's tensors."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain, islice

from worker.engine.catalog.methods import BaseParameters
from worker.engine.catalog.planning.plan import MergePlan
from worker.engine.catalog.primitives.values import DEFAULT_WEIGHT, PerTensor, filters_of, values_at

MOST_PROBLEMS = 10  # number that is reported at once


def parameter_problems(
    plan: MergePlan,
    method: BaseParameters,
    weights: Sequence[PerTensor[float]] = (),
    of_models: Sequence[Mapping[str, PerTensor[float]]] = (),
    *,
    strict_filters: bool = True,
) -> Iterator[tuple[str, str]]:
    """Yield (field of the request, problem): a tensor that `weights` do not suit, and filters that match nothing.

    There are at most `MOST_PROBLEMS` of them.

    Args:
        of_models: each model's own values of the method's parameters.
        strict_filters: whether filters must match.
    """
    unmatched = unmatched_filters(plan, method, weights, of_models) if strict_filters else iter(())
    yield from islice(chain(unmatched, _weightless(plan, method, weights)), MOST_PROBLEMS)


def unmatched_filters(
    plan: MergePlan,
    method: BaseParameters,
    weights: Sequence[PerTensor[float]],
    of_models: Sequence[Mapping[str, PerTensor[float]]],
) -> Iterator[tuple[str, str]]:
    """Yield (field of the request, problem) for every filter that matches no tensor."""
    settings: dict[str, object] = {}
    for number, one in enumerate(method.methods):
        field = f"method.candidates.{number}" if method.search else "method"
        settings |= {f"{field}.{name}": value for name, value in one.settings.items()}
    settings |= {f"models.{index}.weight": weight for index, weight in enumerate(weights)}
    for index, own in enumerate(of_models):
        settings |= {f"models.{index}.parameters.{name}": setting for name, setting in own.items()}
    yield from _unmatched(plan, settings)


def _unmatched(plan: MergePlan, settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for every filter that matches no tensor, in values by field that may have filters."""
    names = [tensor.slot.stored for tensor in plan.backbone]
    matched: dict[str, bool] = {}
    for field, setting in settings.items():
        for index, entry in enumerate(filters_of(setting)):
            pattern = entry.filter
            if pattern not in matched:
                matched[pattern] = any(fnmatchcase(name, pattern) for name in names)
            if not matched[pattern]:
                problem = f"'{pattern}' matches no tensor that is merged; one of them is {names[len(names) // 2]}"
                yield f"{field}.{index}.filter", problem


def _weightless(
    plan: MergePlan, method: BaseParameters, weights: Sequence[PerTensor[float]]
) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for the first tensor that cannot be merged by its weights."""
    for tensor in plan.backbone if weights else ():
        found = values_at(weights, tensor.place, DEFAULT_WEIGHT)
        for one in method.methods:
            problem = one.weights_problem(found)
            if problem is not None:
                yield "models", f"{problem} for tensor {tensor.slot.stored}; method {one.name} needs others"
                return
