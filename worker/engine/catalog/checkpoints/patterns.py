"""Patterns for names of modules, as PEFT's configurations have them, matched in bounded time.

They are regular expressions from outside. Python's own library may take for ever to match one, and other libraries all
memory to read one. The part of the syntax that names need is matched here, by the set of places reached so far.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol

STEPS = 5_000_000  # for all matching together, some seconds; thousands of names with as many patterns take a tenth
LONGEST = 1000  # characters of a pattern
DEEPEST = 20  # levels of groups within each other
CHARACTER = re.compile(r"\\[.\-_dDwW]|\.|\[\^?(?:\\[.\-_dw]|[\w.\-])+\]|[\w\-]", re.ASCII)
TIMES = re.compile(r"(?:[*+?]|\{(?P<least>\d{1,3})(?:(?P<comma>,)(?P<most>\d{0,3}))?\})\??", re.ASCII)
PLACE = re.compile(r"\^|\$|\\b")


class Budget:
    """Counts the steps that are left for matching."""

    def __init__(self, steps: int = STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        """Take steps. Raises ValueError when too few are left."""
        self._left -= steps
        if self._left < 0:
            raise ValueError("its patterns take too long to match")


class PatternPart(Protocol):
    """A part of a pattern."""

    def after(self, name: str, at: Set[int], budget: Budget) -> set[int]:
        """Return the places where a match that begins at one of `at` can end."""


@dataclass(frozen=True)
class Character:
    """One character."""

    one: re.Pattern[str]

    def after(self, name: str, at: Set[int], budget: Budget) -> set[int]:
        """See `Part`."""
        budget.spend(1 + len(at))
        return {index + 1 for index in at if index < len(name) and self.one.fullmatch(name[index])}


@dataclass(frozen=True)
class Anchor:
    """A place between characters: `^`, `$` or `\\b`."""

    which: str

    def after(self, name: str, at: Set[int], budget: Budget) -> set[int]:
        """See `Part`."""
        budget.spend(1 + len(at))
        if self.which == "^":
            return {0} & at
        if self.which == "$":
            return {len(name)} & at
        return {index for index in at if _is_word(name[max(index - 1, 0) : index]) != _is_word(name[index : index + 1])}


@dataclass(frozen=True)
class Alternatives:
    """One of several sequences of parts."""

    sequences: tuple[tuple[PatternPart, ...], ...]

    def after(self, name: str, at: Set[int], budget: Budget) -> set[int]:
        """See `Part`."""
        found: set[int] = set()
        for parts in self.sequences:
            budget.spend(1)
            reached = set(at)
            for part in parts:
                if not reached:
                    break
                reached = part.after(name, reached, budget)
            found |= reached
        return found


@dataclass(frozen=True)
class Repeated:
    """A part that is repeated, `least` to `most` times."""

    part: PatternPart
    least: int
    most: int | None

    def after(self, name: str, at: Set[int], budget: Budget) -> set[int]:
        """See `Part`."""
        reached = set(at)
        for _ in range(self.least):
            reached = self.part.after(name, reached, budget)
        found, times = set(reached), self.least
        while reached and (self.most is None or times < self.most):
            reached = self.part.after(name, reached, budget) - found
            found |= reached
            times += 1
        return found


class Pattern:
    """A regular expression.

    Available are characters, `.`, `\\.`, `\\d`, `\\w`, classes as `[0-9]`, groups as `(0|1)`, after all of these `*`,
    `+`, `?` and numbers of times as `{1,3}`, as well as `^`, `$`, `\\b` and `|`.

    Args:
        budget: the steps for all patterns that are matched together.

    Raises:
        ValueError: the pattern has anything else.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self._parsed, self._budget = _Parser(text).whole(), budget

    def ends(self, name: str, starts: Set[int]) -> set[int]:
        """Return the places where matches that begin at `starts` can end. Raises ValueError if it takes too long."""
        self._budget.spend(1)
        return self._parsed.after(name, starts, self._budget)

    def is_all_of(self, name: str) -> bool:
        """Return whether the pattern matches all of the name."""
        return len(name) in self.ends(name, {0})

    def is_part_of(self, name: str) -> bool:
        """Return whether the pattern matches a part of the name between dots or the name's ends."""
        return any(end == len(name) or name[end] == "." for end in self.ends(name, beginnings(name)))


class ModulePatterns:
    """Values by pattern, see `Pattern`. A module has the value of the first pattern that matches its name or its end.

    An end of a name begins after a dot.

    Raises:
        ValueError: a pattern is not available.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._budget = Budget()
        self._values = [(_length(pattern), Pattern(pattern, self._budget), value) for pattern, value in values.items()]

    def value(self, name: str, default: float) -> float:
        """Return a module's value. Raises ValueError when matching takes more than `STEPS`."""
        places = beginnings(name)
        for length, pattern, value in self._values:
            starts = places if length is None else places & {len(name) - length}
            self._budget.spend(1)
            if starts and len(name) in pattern.ends(name, starts):
                return value
        return default


def beginnings(name: str) -> set[int]:
    """Return the places where the name begins and where a part after a dot begins."""
    return {0, *(index + 1 for index, character in enumerate(name) if character == ".")}


def _is_word(text: str) -> bool:
    return re.fullmatch(r"\w", text) is not None


def _length(pattern: str) -> int | None:
    """Return the length of every text that the pattern matches; None if it varies, or the pattern is not plain."""
    return len(pattern) if re.fullmatch(r"[\w.\-]*", pattern) else None


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"a pattern has more than {LONGEST} characters")
        self._text, self._index = text, 0

    def whole(self) -> PatternPart:
        parsed = self._choice(0)
        if self._index < len(self._text):
            raise self._unavailable()
        return parsed

    def _choice(self, depth: int) -> PatternPart:
        if depth > DEEPEST:
            raise self._unavailable()
        sequences: list[list[PatternPart]] = [[]]
        while self._index < len(self._text) and self._text[self._index] != ")":
            if self._text[self._index] == "|":
                self._index += 1
                sequences.append([])
            else:
                sequences[-1].append(self._part(depth))
        return Alternatives(tuple(tuple(parts) for parts in sequences))

    def _part(self, depth: int) -> PatternPart:
        if place := self._take(PLACE):
            return Anchor(place[0])
        if self._text[self._index] == "(":
            self._index += 1
            if self._text.startswith("?:", self._index):
                self._index += 2
            part = self._choice(depth + 1)
            if not self._text.startswith(")", self._index):
                raise self._unavailable()
            self._index += 1
        else:
            character = self._take(CHARACTER)
            if character is None:
                raise self._unavailable()
            part = Character(_compiled(character[0]))
        times = self._take(TIMES)
        return part if times is None else _repeated(part, times, self._unavailable())

    def _take(self, expected: re.Pattern[str]) -> re.Match[str] | None:
        match = expected.match(self._text, self._index)
        if match is not None:
            self._index = match.end()
        return match

    def _unavailable(self) -> ValueError:
        return ValueError(f"the pattern '{self._text[:100]}' is more than a pattern of names may be")


def _compiled(one: str) -> re.Pattern[str]:
    try:
        return re.compile(one)
    except re.error as error:
        raise ValueError(f"a pattern has the malformed class {one[:100]}") from error


def _repeated(part: PatternPart, times: re.Match[str], unavailable: ValueError) -> PatternPart:
    if times["least"] is None:
        return Repeated(part, int(times[0][0] == "+"), 1 if times[0][0] == "?" else None)
    least = int(times["least"])
    if not times["comma"]:
        return Repeated(part, least, least)
    most = int(times["most"]) if times["most"] else None
    if most is not None and most < least:
        raise unavailable
    return Repeated(part, least, most)
