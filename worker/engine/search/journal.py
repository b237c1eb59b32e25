"""What was tried already, kept for an attempt after this one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from worker.engine.catalog.primitives.strict import Strict


class Look(Strict):
    """What a merge keeps of every model, by name, on the rows that were looked at."""

    retentions: dict[str, float]
    smoothed: dict[str, float]
    """The same of the smoothed metric, which tells better what is best."""


class Tried(Strict):
    """A trial's outcome, at each look at it; an error's message where it failed."""

    parameters: dict[str, Any]
    looks: list[Look]
    seconds: float
    error: str | None = None


class Journal:
    """A file of JSON lines: what the search follows from, and then a line for each trial, in order.

    Optuna's proposals follow from its seed and from what came of the trials before. So a search that is begun again
    asks for the same merges in the same order, and those that are here need not be made again.

    Args:
        path: None keeps nothing.
        identity: of all that outcomes follow from; what was kept of another search does not count.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = path
        self._identity = json.dumps({"identity": identity})
        self._tried = [] if path is None else self._read(path)
        self._rewrite()  # without what a crash left of a line

    def found(self, number: int, parameters: Mapping[str, Any]) -> Tried | None:
        """What came of this trial, if it is known."""
        known = self._tried[number] if number < len(self._tried) else None
        return known if known and known.parameters == dict(parameters) else None

    def add(self, number: int, tried: Tried) -> None:
        """What came of a trial; later ones that are here followed from another outcome."""
        if number < len(self._tried):
            del self._tried[number:]
            self._rewrite()
        self._tried.append(tried)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(tried.model_dump_json() + "\n")
                stream.flush()
                os.fsync(stream.fileno())

    def _read(self, path: Path) -> list[Tried]:
        """As far as lines are whole; nothing of another search."""
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError:
            return []
        if lines[0] != self._identity.encode():
            return []
        found = []
        for line in lines[1:]:
            try:
                found.append(Tried.model_validate_json(line))
            except ValidationError:  # also the nothing after the last line
                break
        return found

    def _rewrite(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in [self._identity, *(t.model_dump_json() for t in self._tried)])
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self._path)
