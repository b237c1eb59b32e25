"""The search space: candidates and their coefficients, as Optuna proposes them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.engine.catalog.contracts.spec import MergeSpec
from worker.engine.catalog.methods import AutoParameters, Choice, MethodParameters, Range
from worker.engine.catalog.methods.auto import ALIGN_RIDGE, WEIGHTS, space_of, with_values
from worker.engine.catalog.primitives.values import PerTensor

if TYPE_CHECKING:
    from optuna import Trial

CANDIDATE = "candidate"
RIDGE = "align_ridge"


@dataclass(frozen=True)
class Proposal:
    """One merge to try."""

    candidate: int
    method: MethodParameters
    weights: tuple[PerTensor[float], ...]
    """Weight lambda of every model, including those that take no part."""
    align_ridge: float
    parameters: Mapping[str, Any]
    """Values that are tried, by name."""


class Space:
    """The search space of a job.

    A model's weight and the ridge of head alignment are the same parameters for all candidates, so that the search
    learns from each candidate about the others. Only the proportions of weights count, so that of the first model that
    takes part is kept. Where layers are refitted, all weights are kept: such a merge takes as long as dozens of others.

    Args:
        aligns: whether heads are aligned.
    """

    def __init__(self, spec: MergeSpec, auto: AutoParameters, *, aligns: bool) -> None:
        self._methods = auto.methods
        self.names = unique([method.name for method in self._methods])
        self._spaces = [space_of(candidate, has_base=spec.base is not None) for candidate in auto.candidates or ()]
        self._weights = [model.weight for model in spec.models]
        self._ridge = spec.output.align_ridge
        self._aligns = aligns
        self._weighed: dict[str, int] = {}
        taking_part = [index for index, model in enumerate(spec.models) if model.takes_part]
        if all(isinstance(self._weights[index], int | float) for index in taking_part):
            self._weighed = {f"weight {spec.models[index].name}": index for index in taking_part[1:]}

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self._methods)

    @property
    def methods(self) -> Sequence[MethodParameters]:
        return self._methods

    def first(self, candidate: int) -> dict[str, Any]:
        """Return a candidate's default values, by Optuna's names."""
        method = self._methods[candidate]
        chosen: dict[str, Any] = {CANDIDATE: self.names[candidate]}
        for name in self._spaces[candidate]:
            chosen[f"{self.names[candidate]} {name}"] = getattr(method, name)
        if self._aligns:
            chosen[RIDGE] = self._ridge
        return chosen | dict.fromkeys(self._weights_of(candidate), 1.0)

    def propose(self, trial: "Trial") -> Proposal:
        """Return the merge that Optuna proposes."""
        name = trial.suggest_categorical(CANDIDATE, self.names) if len(self) > 1 else self.names[0]
        candidate = self.names.index(name)
        tried = {key: _suggested(trial, f"{name} {key}", space) for key, space in self._spaces[candidate].items()}
        weights, parameters = list(self._weights), dict(tried)
        for key, index in self._weights_of(candidate).items():
            factor = _suggested(trial, key, WEIGHTS)
            weights[index] = parameters[key] = weights[index] * factor
        ridge = self._ridge
        if self._aligns:
            ridge = parameters[RIDGE] = _suggested(trial, RIDGE, ALIGN_RIDGE)
        method = with_values(self._methods[candidate], tried)
        return Proposal(candidate, method, tuple(weights), ridge, parameters)

    def _weights_of(self, candidate: int) -> dict[str, int]:
        method = self._methods[candidate]
        return self._weighed if method.weighs_models and not method.refits_layers else {}


def unique(names: Sequence[str]) -> list[str]:
    """Number names that are repeated: `regmean`, `regmean 2`."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return found


def _suggested(trial: "Trial", name: str, space: Range | Choice) -> Any:
    if isinstance(space, Choice):
        return trial.suggest_categorical(name, space.values)
    return trial.suggest_float(name, space.low, space.high, log=space.log)
