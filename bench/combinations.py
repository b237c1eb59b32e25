"""Chooses the experts that are merged with each other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

Combination = tuple[str, ...]
"""Names of tasks."""
MOST = {3: 6}
"""Number of combinations of a size, where it is not all of them."""


def combinations_of(tasks: Sequence[str]) -> Iterator[Combination]:
    """Yield all pairs, some triples in which every task is about as often, all fours, and all tasks at once."""
    for size in (2, 3, 4):
        if size < len(tasks):
            every = list(combinations(tasks, size))
            yield from sorted(_balanced(every, MOST.get(size, len(every))), key=every.index)
    yield tuple(tasks)


def _balanced(every: Sequence[Combination], most: int) -> list[Combination]:
    """Return so many of the combinations, one after the other those whose tasks are the rarest so far."""
    times: Counter[str] = Counter()
    chosen: list[Combination] = []
    while len(chosen) < min(most, len(every)):
        rest = [tasks for tasks in every if tasks not in chosen]
        chosen.append(min(rest, key=lambda tasks: sum(times[task] for task in tasks)))
        times.update(chosen[-1])
    return chosen
