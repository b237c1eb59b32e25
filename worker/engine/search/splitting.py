"""Splits evaluation rows into two halves: one to search on, one to report on."""

import hashlib
import json
from collections.abc import Sequence

from worker.engine.catalog.data.rows import Row, Text
from worker.engine.catalog.primitives.errors import InvalidDataset


def halves(rows: Sequence[Row], seed: int, source: str) -> tuple[list[int], list[int]]:
    """Return the places of the search rows and of the held-out rows, each in the order of `rows`.

    Rows with the same text are in the same half, so that no held-out text was searched on. Texts come in an order that
    depends only on them and the seed, and the first half of their rows is searched on. So if models are evaluated on
    the same texts, in whatever order, none searches on texts that are held out for another. The sizes of the halves
    differ by the rows of one text at most.

    Raises:
        InvalidDataset: there are fewer than two different texts.
    """
    places: dict[tuple[Text | None, ...], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.content, []).append(place)
    if len(places) < 2:
        raise InvalidDataset(source, "method auto needs two different rows at least, to search on and to report on")

    def drawn(text: tuple[Text | None, ...]) -> bytes:
        return hashlib.sha256(json.dumps([seed, *text]).encode()).digest()

    searched: list[int] = []
    held_out: list[int] = []
    for text in sorted(places, key=drawn):
        is_before_the_middle = 2 * len(searched) + len(places[text]) < len(rows)
        (searched if is_before_the_middle else held_out).extend(places[text])
    return sorted(searched), sorted(held_out)
