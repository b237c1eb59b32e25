"""Reports the progress of a job."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

OnProgress = Callable[[str, int, int, str, Mapping[str, tuple[int, int]]], None]
"""Called with phase, done, total and unit, and with done and total of each model. It may raise to stop the job."""
OnRows = Callable[[int], None]
"""Called with the number of rows that were done since the last call. It may raise to stop the job."""


@dataclass
class Phase:
    """Counts the work done within a phase, and tells the listener.

    Args:
        of: the part of the total that is each model's, in a phase that goes through the models one by one.
    """

    name: str
    total: int
    unit: str
    listener: OnProgress
    of: Mapping[str, int] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        self._done_of = dict.fromkeys(self.of, 0)
        self._tell()

    def advance(self, count: int = 1, model: str | None = None) -> None:
        """Count what was done, and of which model."""
        self.done += count
        if model is not None:
            self._done_of[model] += count
        self._tell()

    def advance_of(self, model: str) -> OnRows:
        """Return a function that counts rows of a model."""
        return partial(self.advance, model=model)

    def _tell(self) -> None:
        models = {name: (self._done_of[name], total) for name, total in self.of.items()}
        self.listener(self.name, self.done, self.total, self.unit, models)
