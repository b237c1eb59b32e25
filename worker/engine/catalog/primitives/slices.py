"""Runs of layers that a merge's result is put together from."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from worker.engine.catalog.primitives.strict import Strict

Number = Annotated[int, Field(ge=0, le=100_000)]
Run = tuple[Number, Number]
"""The number of the first layer, and that of the one after the last, counted from 0."""


def _check_run(run: Run) -> None:
    start, stop = run
    if start >= stop:
        raise ValueError(f"layers [{start}, {stop}] are none; the second number is one more than the last layer's")


class Slice(Strict):
    """Consecutive layers of a model."""

    model: str
    """The model's name in the request's `models`."""
    layers: Run | None = None
    """The number of the first layer, and that of the one after the last, counted from 0; null: all layers."""

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if self.layers is not None:
            _check_run(self.layers)
        return self


class OutputSlice(Strict):
    """Consecutive layers of the result, each merged from one layer of every source."""

    sources: Annotated[list[Slice], Field(min_length=1, max_length=64)]
    """Runs of the same length, of different models. Other models take no part in these layers."""
    base_layers: Run | None = None
    """Layers of the base; null: the same as the first source's."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {source.layers[1] - source.layers[0] for source in self.sources if source.layers is not None}
        if self.base_layers is not None:
            _check_run(self.base_layers)
            lengths.add(self.base_layers[1] - self.base_layers[0])
        if len(lengths) > 1:
            raise ValueError(f"the sources of a slice have {' and '.join(map(str, sorted(lengths)))} layers")
        names = [source.model for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("a model is there twice in one slice; name its checkpoint twice, as two models")
        return self
