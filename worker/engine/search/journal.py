"""Keeps the trials that were made for an attempt after this one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from worker.engine.catalog.primitives.strict import Strict


class RungOutcome(Strict):
    """Retention of every model, by name, on the rows of one look at a merge."""

    retentions: dict[str, float]
    smoothed: dict[str, float]
    """Retention of the smoothed metric, which is better at finding the best merge."""


class TrialOutcome(Strict):
    """A trial's outcome at each look at it, or an error's message if it failed."""

    parameters: dict[str, Any]
    looks: list[RungOutcome]
    seconds: float
    error: str | None = None


class Journal:
    """A file of JSON lines: the search's identity, and then a line for each trial, in order.

    Optuna's proposals depend on its seed and on the outcomes of earlier trials. So a search that is begun again asks
    for the same merges in the same order, and those in the journal need not be made again.

    Args:
        path: path of the file; None keeps nothing.
        identity: digest of everything that outcomes depend on; the journal of another search does not count.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = path
        self._identity = json.dumps({"identity": identity})
        self._tried = [] if path is None else self._read(path)
        self._rewrite()  # without a part of a line that a crash left

    def found(self, number: int, parameters: Mapping[str, Any]) -> TrialOutcome | None:
        """Return the outcome of this trial, if it is known."""
        known = self._tried[number] if number < len(self._tried) else None
        return known if known and known.parameters == dict(parameters) else None

    def add(self, number: int, tried: TrialOutcome) -> None:
        """Add the outcome of a trial. Later trials in the journal are dropped: they followed another outcome."""
        if number < len(self._tried):
            del self._tried[number:]
            self._rewrite()
        self._tried.append(tried)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(tried.model_dump_json() + "\n")
                stream.flush()
                os.fsync(stream.fileno())

    def _read(self, path: Path) -> list[TrialOutcome]:
        """Read trials as far as lines are whole; none of another search."""
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError:
            return []
        if lines[0] != self._identity.encode():
            return []
        found = []
        for line in lines[1:]:
            try:
                found.append(TrialOutcome.model_validate_json(line))
            except ValidationError:  # also raised for the empty text after the last line
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
