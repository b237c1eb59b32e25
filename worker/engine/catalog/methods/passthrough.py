"""`passthrough`: layers of one or several models stacked to one model, none of them changed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.engine.catalog.methods.entry import MethodEntry, MethodParameters
from worker.engine.catalog.strict import Strict

Number = Annotated[int, Field(ge=0, le=100_000)]


class Slice(Strict):
    """Consecutive layers of a model."""

    model: str
    """Its name in the request's `models`."""
    layers: tuple[Number, Number]
    """The first, and the one after the last, from 0."""

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        start, stop = self.layers
        if start >= stop:
            raise ValueError(f"layers [{start}, {stop}] are none; the second number is one more than the last layer's")
        return self


class PassthroughParameters(MethodParameters):
    name: Literal["passthrough"] = "passthrough"
    scale: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Nothing but 1: tensors are copied."""
    slices: Annotated[list[Slice], Field(min_length=1, max_length=1000)]
    """What becomes the layers 0, 1, … of the result. What lies before the layers is of the first slice's model, as are
    configuration and tokenizer; what lies after them is of the last slice's."""


PASSTHROUGH = MethodEntry(
    name="passthrough",
    formula="layers = [*layers_(m_1)[a_1:b_1], *layers_(m_2)[a_2:b_2], ...]",
    source="Kim et al. 2023, SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling, "
    "arXiv 2312.15166; there training goes on afterwards",
    needs=(),
    parameters=PassthroughParameters,
)
