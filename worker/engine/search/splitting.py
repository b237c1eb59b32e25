"""Evaluation rows in two halves: one to search on, one to report on."""

import random
from collections.abc import Sequence

from worker.engine.catalog.errors import InvalidDataset
from worker.engine.catalog.rows import Row


def halves(rows: Sequence[Row], seed: int, source: str) -> tuple[list[int], list[int]]:
    """Places of the search rows and of the held-out rows, each in the order of `rows`.

    Rows of the same text are in the same half, so that nothing that is held out was seen; where the longest run of one
    text allows it, the halves differ by as many rows as that at most.

    Raises:
        InvalidDataset: there are not two different texts.
    """
    places: dict[tuple[str, str | None], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault((row.text, row.text_pair), []).append(place)
    if len(places) < 2:
        raise InvalidDataset(source, "method auto needs two different rows at least, to search on and to report on")
    groups = list(places.values())
    random.Random(seed).shuffle(groups)
    searched: list[int] = []
    held_out: list[int] = []
    for group in groups:  # the smaller half is the next one's
        (searched if len(searched) <= len(held_out) else held_out).extend(group)
    return sorted(searched), sorted(held_out)
