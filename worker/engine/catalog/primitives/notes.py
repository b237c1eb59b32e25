"""Notes of a result for its reader. Doubts, which put a number in question, come first."""

from collections.abc import Iterable


class Doubt(str):
    """A note that puts a number of the result in question; others only tell what was done."""

    __slots__ = ()


def in_order(notes: Iterable[str]) -> list[str]:
    """Put doubts first and keep each note once; otherwise the order stays."""
    return [str(note) for note in sorted(dict.fromkeys(notes), key=lambda note: not isinstance(note, Doubt))]
