"""Patterns for names of modules, as PEFT's configurations have them, matched in bounded time.

They are regular expressions and come from outside: Python's own library may take for ever to match one, others all
memory to read one. What names need of them is matched here, by the set of places that can have been reached.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

STEPS = 5_000_000  # of all matching together: some seconds; thousands of names with as many patterns take a tenth
LONGEST = 1000  # characters
PIECE = re.compile(
    r"(?P<anchor>[\^$])"
    r"|(?P<one>\\[.\-dw]|\.|\[\^?[\w.\-]+\]|[\w\-])(?P<times>[*+?]\??)?"
    r"|\((\?:)?(?P<group>[^()]*)\)",
    re.ASCII,
)


@dataclass(frozen=True)
class Piece:
    """One character, once or so often as is said, or one of several patterns, or a place."""

    one: re.Pattern[str] | None = None
    is_optional: bool = False
    repeats: bool = False
    alternatives: tuple[tuple["Piece", ...], ...] = ()
    anchor: str | None = None


class ModulePatterns:
    """Values by pattern: a module has that of the first that matches its name, or the end of it after a dot.

    Available are characters, `.`, `\\.`, `\\d`, `\\w`, classes as `[0-9]`, after all of these `*`, `+` and `?`, as well
    as `^`, `$`, `|` and groups without a number of times, as `(0|1)`.

    Raises:
        ValueError: a pattern has anything else.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = [(_length(pattern), _alternatives(pattern), value) for pattern, value in values.items()]
        self._left = STEPS

    def value(self, name: str, default: float) -> float:
        """Raises ValueError when matching takes more than `STEPS`."""
        beginnings = {0, *(index + 1 for index, character in enumerate(name) if character == ".")}
        for length, alternatives, value in self._values:
            starts = beginnings if length is None else beginnings & {len(name) - length}
            self._spend(1)
            if starts and len(name) in self._ends(alternatives, name, starts):
                return value
        return default

    def _ends(self, alternatives: tuple[tuple[Piece, ...], ...], name: str, starts: Set[int]) -> set[int]:
        """Where a match can end that begins at one of `starts`."""
        ends: set[int] = set()
        for pieces in alternatives:
            at = set(starts)
            for piece in pieces:
                self._spend(1 + len(at))
                at = self._after(piece, name, at)
            ends |= at
        return ends

    def _after(self, piece: Piece, name: str, at: set[int]) -> set[int]:
        if piece.anchor is not None:
            return at & {0 if piece.anchor == "^" else len(name)}
        if piece.one is None:
            return self._ends(piece.alternatives, name, at)
        one = piece.one
        found: set[int] = set()
        new = at
        while new:
            self._spend(len(new))
            new = {index + 1 for index in new if index < len(name) and one.fullmatch(name[index])} - found
            found |= new
            if not piece.repeats:
                break
        return found | at if piece.is_optional else found

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError("its patterns take too long to match")


def _length(pattern: str) -> int | None:
    """Length of all that the pattern matches; None if it differs, or the pattern is not plain."""
    return len(pattern) if re.fullmatch(r"[\w.\-]*", pattern) else None


def _alternatives(pattern: str) -> tuple[tuple[Piece, ...], ...]:
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern has more than {LONGEST} characters")
    alternatives: list[list[Piece]] = [[]]
    index = 0
    while index < len(pattern):
        if pattern[index] == "|":
            alternatives.append([])
            index += 1
            continue
        match = PIECE.match(pattern, index)
        if match is None:
            raise ValueError(f"the pattern '{pattern[:100]}' is more than a pattern of names may be")
        alternatives[-1].append(_piece(match))
        index = match.end()
    return tuple(tuple(pieces) for pieces in alternatives)


def _piece(match: re.Match[str]) -> Piece:
    if match["anchor"]:
        return Piece(anchor=match["anchor"])
    if match["one"] is None:
        return Piece(alternatives=_alternatives(match["group"]))
    times = (match["times"] or "1")[0]
    try:
        return Piece(re.compile(match["one"]), is_optional=times in "*?", repeats=times in "*+")
    except re.error as error:
        raise ValueError(f"a pattern has the malformed class {match['one'][:100]}") from error
