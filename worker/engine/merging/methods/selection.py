"""Finds the value of a given rank in a tensor, exactly, without sorting and without holding the tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worker.engine.catalog.planning.memory import HELD_BLOCKS
from worker.engine.merging.methods.blocks import SAMPLED_RUNS, Block, Versions

SAMPLE_ELEMENTS = 1 << 15
MARGIN = 0.015  # share of the sample on both sides of the rank; the rank's standard error is at most 0.28 %
FEW = 2 * SAMPLE_ELEMENTS  # ordering so many values takes less time than a sample saves

ANY = (-math.inf, math.inf)

Array = NDArray[Any]


def kept_elements(density: float, shape: Sequence[int]) -> int:
    """Return the number of a tensor's elements that `density` keeps, at least one."""
    return max(1, round(density * math.prod(shape)))


def nth_largest(versions: Versions, values: Callable[[Block], Sequence[Tensor]], ranks: Sequence[int]) -> list[float]:
    """Find the value of a rank in each of several series: 1 is the largest; equal values have ranks of their own.

    A sample gives two values between which it probably lies. A pass over all blocks counts the values above these and
    gathers the values between them. If these are too many, or the rank lies outside, the search goes on with the values
    that are not ruled out. The result depends neither on the sample nor on the blocks.

    Args:
        values: returns the series' values in a block, one for each of the tensor's elements.
        ranks: the rank for each series, from 1 to the number of elements.

    Returns:
        The values, NaN for a series that has a NaN where it matters.
    """
    limit = max(1, HELD_BLOCKS * versions.block_elements // len(ranks))
    searches = [_Search(rank, math.prod(versions.shape)) for rank in ranks]
    few, first = min(limit, FEW), True
    while searching := [(index, search) for index, search in enumerate(searches) if search.found is None]:
        if any(search.between > few for _, search in searching):
            # Once values are ruled out, the others may be anywhere.
            for block in versions.sample(SAMPLE_ELEMENTS) if first else versions.blocks():
                arrays = [_flat(series) for series in values(block)]
                sampled = arrays[0].size * min(versions.count, SAMPLED_RUNS)
                for index, search in searching:
                    search.sample(arrays[index], sampled if first else search.between)
                del block, arrays  # freed before the next is read
        for _, search in searching:
            search.bracket(few)
        for block in versions.blocks():
            arrays = [_flat(series) for series in values(block)]
            for index, search in searching:
                search.count(arrays[index], limit)
            del block, arrays
        for _, search in searching:
            search.narrow()
        few, first = limit, False
    return [math.nan if search.found is None else search.found for search in searches]


@dataclass
class _Search:
    """The search for a value that lies between `low` and `high`, and the number of values that do so."""

    rank: int
    above_low: int
    low: float = -math.inf
    high: float = math.inf
    above_high: int = 0  # includes values equal to `high`
    found: float | None = None
    sampled: list[Array] = field(default_factory=list)
    inner: tuple[float, float] = ANY
    """Bounds of the values that the present pass gathers."""
    gathered: list[Array] = field(default_factory=list)
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Numbers of values above `inner`, at its upper end, inside, and at its lower end."""

    @property
    def between(self) -> int:
        return self.above_low - self.above_high

    @property
    def _is_unbounded(self) -> bool:
        """Whether nothing is ruled out yet, not even infinite values."""
        return (self.low, self.high) == ANY and self.above_high == 0

    def sample(self, values: Array, count: int) -> None:
        """Keep some of these values. All calls together bring about `count` values."""
        inside = values if self._is_unbounded else _between(values, self.low, self.high)
        self.sampled.append(inside[:: max(1, count // SAMPLE_ELEMENTS)].copy())

    def bracket(self, few: int) -> None:
        """Choose the values that the next pass gathers: all that are left where they are few."""
        self.inner, self.gathered, self.counts = (self.low, self.high), [], [0, 0, 0, 0]
        sample, self.sampled = np.concatenate(self.sampled or [np.empty(0)]), []
        sample = sample[~np.isnan(sample)]
        if self.between <= few or not len(sample):
            return
        place = len(sample) * (1 - (self.rank - self.above_high) / self.between)
        first, last = math.floor(place - MARGIN * len(sample)), math.ceil(place + MARGIN * len(sample))
        sample.partition([place for place in (first, last) if 0 <= place < len(sample)] or 0)
        self.inner = (
            float(sample[first]) if first >= 0 else self.low,
            float(sample[last]) if last < len(sample) else self.high,
        )

    def count(self, values: Array, limit: int) -> None:
        low, high = self.inner
        if self.inner == ANY and self._is_unbounded:
            inside, found = values, (0, 0, values.size, 0)
        else:
            is_above = values > high
            near = values.take(np.flatnonzero((values >= low) ^ is_above))  # a mask would slow other threads
            inside = _between(near, low, high)
            above, at_high = int(np.count_nonzero(is_above)), int(np.count_nonzero(near == high))
            at_low = near.size - inside.size - at_high
            found = (above, at_high, inside.size, at_low)
        self.counts = [count + more for count, more in zip(self.counts, found, strict=True)]
        if self.counts[2] <= limit:
            self.gathered.append(inside)

    def narrow(self) -> None:
        low, high = self.inner
        above, at_high, inside, at_low = self.counts
        everything = self.inner == (self.low, self.high)
        from_high = above + at_high
        if self.rank <= above:
            self.low, self.above_low = high, above
        elif self.rank <= from_high:
            self.found = high
        elif self.rank <= from_high + inside:
            values = np.concatenate(self.gathered)
            if values.size == inside:
                place = inside - (self.rank - from_high)
                values.partition(place)
                self.found = float(values[place])
            else:
                self.low, self.above_low, self.high, self.above_high = low, from_high + inside, high, from_high
        elif self.rank <= from_high + inside + at_low:
            self.found = low
        else:
            self.high, self.above_high = low, from_high + inside + at_low
        if everything and self.found is None:
            self.found = math.nan  # NaN is neither above nor below
        self.gathered = []


def _flat(values: Tensor) -> Array:
    return values.flatten().numpy()


def _between(values: Array, low: float, high: float) -> Array:
    return values[(values > low) & (values < high)]
