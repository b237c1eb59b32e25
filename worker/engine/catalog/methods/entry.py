"""Describes a method besides its parameters, without running it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from worker.engine.catalog.methods.parameters import BaseParameters


@dataclass(frozen=True)
class Range:
    """Numbers that `auto` tries for a parameter."""

    low: float
    high: float
    log: bool = False
    """Whether equal ratios count alike, instead of equal distances."""


@dataclass(frozen=True)
class Choice:
    """Values that `auto` tries for a parameter."""

    values: tuple[str | float | bool, ...]


SearchSpace = Mapping[str, Range | Choice]
"""Values to try, by parameter."""


Parameters = TypeVar("Parameters", bound=BaseParameters, covariant=True)


@dataclass(frozen=True)
class MethodEntry(Generic[Parameters]):
    name: str
    formula: str
    source: str
    needs: tuple[Literal["dataset", "base", "evaluation"], ...]
    parameters: type[Parameters]
    models: tuple[int, int | None] = (1, None)
    """Least and largest number of models that can take part; None: any number."""
    search: SearchSpace = field(default_factory=dict)
    """Values that `auto` tries for parameters that a candidate leaves open; `scale` only where there is a base."""

    @property
    def models_wanted(self) -> str:
        least, most = self.models
        return f"exactly {least}" if least == most else f"at least {least}"

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "formula": self.formula,
            "source": self.source,
            "needs": list(self.needs),
            "models": {"least": self.models[0], "most": self.models[1]},
            "per_model": list(self.parameters.per_model),
            "search": {name: asdict(space) for name, space in self.search.items()},
            "parameters": self.parameters.model_json_schema(),
        }
