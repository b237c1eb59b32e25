"""The methods of mergekit that have a counterpart here, with their parameters and defaults.

Defaults are mergekit's (0.1.5), never ours, so that the request says everything that mergekit would do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

REQUIRED = object()


class Base(Enum):
    """The role that `base_model` has for a method."""

    ORIGIN = "task vectors are differences from it"
    OPTIONAL_ORIGIN = "as ORIGIN, where it is given"
    FIRST = "the first of the models"
    MODEL = "a model like any other"


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method of mergekit.

    `ours` is the name of the method's parameter here, if it is another. A method here that has no such parameter does
    what the default says.
    """

    default: Any = REQUIRED
    kind: Literal["number", "flag", "count", "plain"] = "number"
    """Kind of value. A number may differ between tensors; a plain value may not."""
    ours: str | None = None


@dataclass(frozen=True)
class Method:
    base: Base
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    weighs_models: bool = False
    without_effect: frozenset[str] = frozenset()
    """Parameters that mergekit takes but that change nothing."""


def flag(default: bool, ours: str | None = None) -> Parameter:
    return Parameter(default, "flag", ours)


def _task_vectors(normalize: bool, rescale: bool, **more: Parameter) -> Method:
    given = {"normalize": flag(normalize), "rescale": flag(rescale), "lambda": Parameter(1.0, ours="scale")}
    parameters = {**given, "density": Parameter(1.0), **more}
    return Method(Base.ORIGIN, parameters, weighs_models=True, without_effect=frozenset({"int8_mask"}))


TRANSLATED: dict[str, Method] = {
    "linear": Method(Base.MODEL, {"normalize": flag(True)}, weighs_models=True),
    "slerp": Method(Base.FIRST, {"t": Parameter()}),
    "nuslerp": Method(
        Base.OPTIONAL_ORIGIN,
        {"nuslerp_flatten": flag(True), "nuslerp_row_wise": flag(False)},
        weighs_models=True,
    ),
    "task_arithmetic": Method(
        Base.ORIGIN,
        {"normalize": flag(False), "lambda": Parameter(1.0, ours="scale")},
        weighs_models=True,
        without_effect=frozenset({"int8_mask", "rescale", "density"}),
    ),
    "ties": _task_vectors(normalize=True, rescale=False),
    "dare_linear": _task_vectors(normalize=False, rescale=True),
    "dare_ties": _task_vectors(normalize=False, rescale=True),
    "della": _task_vectors(normalize=True, rescale=True, epsilon=Parameter(0.15)),
    "della_linear": _task_vectors(normalize=False, rescale=True, epsilon=Parameter(0.15)),
    "breadcrumbs": _task_vectors(normalize=False, rescale=False, gamma=Parameter(0.01)),
    "breadcrumbs_ties": _task_vectors(normalize=False, rescale=False, gamma=Parameter(0.01)),
    "model_stock": Method(Base.ORIGIN, {"filter_wise": flag(False)}),
    "karcher": Method(Base.MODEL, {"max_iter": Parameter(10, "count"), "tol": Parameter(1e-5)}),
    "sce": Method(Base.ORIGIN, {"select_topk": Parameter(1.0)}, without_effect=frozenset({"int8_mask"})),
    "multislerp": Method(
        Base.OPTIONAL_ORIGIN,
        {"normalize_weights": flag(True), "eps": Parameter(1e-8, "plain")},
        weighs_models=True,
    ),
    "nearswap": Method(Base.ORIGIN, {"t": Parameter()}),
    "arcee_fusion": Method(Base.ORIGIN),
    "ram": Method(Base.ORIGIN, {"epsilon": Parameter(1e-5)}),
    "ramplus_tl": Method(Base.ORIGIN, {"epsilon": Parameter(1e-5), "r": Parameter(0.1), "alpha": Parameter(0.2)}),
    "passthrough": Method(Base.MODEL, {"scale": Parameter(1.0)}),
}
"""Translations by `merge_method`; the methods here have the same names."""
