"""The output's new tokens, and the rows of the models' tensors that belong to each row of its token-indexed tensors."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from worker.engine.catalog.primitives.errors import InvalidRequest


@dataclass(frozen=True)
class NewToken:
    """A token that `union` appends. If it is found in text as it is, `entry` is its entry of `added_tokens`."""

    content: str
    id: int
    entry: Mapping[str, Any] | None


@dataclass(frozen=True)
class GivenRow:
    """The row that a recipe gives a token in the models that lack it, or, with `force`, in all models."""

    model: int | None
    """Position of the model whose row it is; None: the base, or zeros."""
    row: int | None
    """Number of the row in that model; None: zeros."""
    force: bool


@dataclass(frozen=True)
class TokenRows:
    """Maps each row of the output to its token's row in each model and in the base; -1 where there is none."""

    models: tuple["array[int]", ...]
    base: "array[int] | None"
    given: Mapping[int, GivenRow] = field(default_factory=dict)
    """Rows that a recipe gives to single tokens, by the row's number in the output."""
    padding: int = 0
    """Number of last rows that are the mean of all others."""

    def of(self, members: Sequence[int]) -> "TokenRows":
        """Return the rows for some of the models. Raises InvalidRequest if a recipe takes a row from another model."""
        given = {}
        for place, one in self.given.items():
            if one.model is not None and one.model not in members:
                problem = "a token's row is to be that of a model that has no part in the first or the last slice"
                raise InvalidRequest(problem, field="output.tokens")
            given[place] = one if one.model is None else replace(one, model=members.index(one.model))
        return replace(self, models=tuple(self.models[member] for member in members), given=given)


def runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, own row, length) of every stretch that is contiguous on both sides; entries of -1 are left out."""
    start = 0
    while start < len(places):
        stop = start + 1
        while places[start] >= 0 and stop < len(places) and places[stop] == places[start] + stop - start:
            stop += 1
        if places[start] >= 0:
            yield start, places[start], stop - start
        start = stop
