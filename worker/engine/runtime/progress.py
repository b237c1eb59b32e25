"""Reports the progress of a job."""

from collections.abc import Callable
from dataclasses import dataclass

OnProgress = Callable[[str, int, int, str], None]
"""Called with phase, done, total and unit. It may raise to stop the job."""
OnRows = Callable[[int], None]
"""Called with the number of rows that were done since the last call. It may raise to stop the job."""


@dataclass
class Phase:
    """Counts the work done within a phase, and tells the listener."""

    name: str
    total: int
    unit: str
    listener: OnProgress
    done: int = 0

    def __post_init__(self) -> None:
        self.listener(self.name, 0, self.total, self.unit)

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.listener(self.name, self.done, self.total, self.unit)
