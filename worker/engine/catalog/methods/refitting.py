"""Base class of methods that refit the layers of another method's merge to their real inputs."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, field_serializer, model_validator

from worker.engine.catalog.methods.parameters import (
    GradientParameters,
    MeasuringParameters,
    MethodParameters,
    ScoringParameters,
)
from worker.engine.catalog.methods.regmean import GRAM_MATRICES
from worker.engine.catalog.methods.statistic import Statistic
from worker.engine.catalog.primitives.values import TensorPlace

if TYPE_CHECKING:
    StartingMethod = MethodParameters  # otherwise made of all methods, once these are known

OF_THE_WHOLE = ("examples", "precision")
"""Parameters that a start shares with the method that starts from it."""


def default_start(name: str, **given: float) -> MethodParameters:
    """Return the method of this name with these parameters."""
    from worker.engine.catalog.methods.merging import METHODS  # imported here because it imports this module's methods

    return METHODS[name].parameters.model_validate({"name": name, **given})


class RefittingParameters(MeasuringParameters):
    """Parameters of methods that refit the layers of a merge. What that merge needs, the method needs too."""

    shared: ClassVar[Mapping[str, object]] = {}
    """Parameters of this method that are those of its start, where the start has them, and their defaults."""

    start: "StartingMethod" = Field(
        default_factory=lambda: default_start("regmean"), json_schema_extra={"default": "regmean"}
    )
    """Method whose merge is refitted: its name, or an object with its parameters, but for `examples` and `precision`,
    which are those of the whole."""

    @model_validator(mode="after")
    def _start_suits(self) -> Self:
        if self.examples == "auto":
            raise ValueError(
                f"examples 'auto' stops by scores of mask nodes; {self.name} refits to all rows: give a number"
            )
        if getattr(self.start, "preset", None) is not None:
            raise ValueError("a preset reads rows in an order of its own, so it cannot be a start; leave it out")
        for name in OF_THE_WHOLE:
            if name in self.start.model_fields_set:
                raise ValueError(f"{name} is of the whole method; give it to {self.name} instead of its start")
        return self

    @property
    def idle(self) -> Mapping[str, str]:
        found = {}
        for name in self.shared:
            if name not in type(self.start).model_fields:
                found[name] = f"is of a start that is a regression, and the start is {self.start.name}"
            elif name in self.start.model_fields_set:
                found[name] = f"is given twice, to {self.name} and to its start"
        return {**super().idle, **found}

    @field_serializer("start")
    def _start_as_given(self, start: MethodParameters) -> dict[str, Any]:
        return {"name": start.name, **start.model_dump(mode="json", exclude_unset=True)}

    @property
    def as_asked(self) -> Mapping[tuple[str, ...], MethodParameters]:
        return {**super().as_asked, ("start", self.start.name): self.start}

    @property
    def starts_from(self) -> MethodParameters:
        found: dict[str, Any] = {"precision": self.precision}
        if isinstance(self.start, MeasuringParameters):
            found["examples"] = self.examples
        for name, default in self.shared.items():
            if getattr(self, name) != default:
                found[name] = getattr(self, name)
        return self.start.model_copy(update=found)

    @property
    def refits_layers(self) -> bool:
        return True

    @property
    def settings(self) -> dict[str, object]:
        of_start = {f"start.{name}": value for name, value in self.start.settings.items()}
        return {**super().settings, **of_start}

    def is_measured(self, given: Collection[str]) -> bool:
        return True

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.starts_from.statistics

    @property
    def gradients(self) -> GradientParameters | None:
        return self.starts_from.gradients

    @property
    def scoring(self) -> ScoringParameters | None:
        return self.starts_from.scoring

    @property
    def needs_labels(self) -> bool:
        return self.start.needs_labels

    @property
    def needs_base(self) -> bool:
        return self.start.needs_base or super().needs_base

    @property
    def needs_base_by(self) -> str:
        return f"start {self.start.name}" if self.start.needs_base else super().needs_base_by

    @property
    def needs_table(self) -> bool:
        return self.start.needs_table

    @property
    def estimated(self) -> str | None:
        return self.start.estimated

    @property
    def merges_rows(self) -> bool:
        return False

    def solving_bytes(self, outputs: int, inputs: int) -> int:
        return max(GRAM_MATRICES * 8 * (inputs + 1) ** 2, self.start.solving_bytes(outputs, inputs))

    @property
    def selects_by_rank(self) -> bool:
        return self.start.selects_by_rank

    @property
    def asked_batch_tokens(self) -> int | None:
        return self.start.asked_batch_tokens

    @property
    def most_batch_tokens(self) -> int:
        return self.start.most_batch_tokens

    def shares(self, weights: Sequence[float], place: TensorPlace) -> Sequence[float] | None:
        return self.start.shares(weights, place)

    def weights_problem(self, weights: Sequence[float]) -> str | None:
        return super().weights_problem(weights) or self.start.weights_problem(weights)
