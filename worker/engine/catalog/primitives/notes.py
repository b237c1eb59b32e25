"""Notes of a result for its reader. Those that put a number in question come first."""

from collections.abc import Iterable


class Doubt(str):
    """A note that puts a number of the result in question; others only tell what was done."""

    __slots__ = ()


def in_order(notes: Iterable[str]) -> list[str]:
    """Doubts first, each note once, otherwise as they came."""
    return [str(note) for note in sorted(dict.fromkeys(notes), key=lambda note: not isinstance(note, Doubt))]
