"""The interface of kept statistics, wherever they are. Any of them may vanish at any moment."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from app.storage.files import StoredFile
from worker.engine.catalog.contracts.statistics import About


@dataclass(frozen=True)
class KeptStatistic(ABC):
    address: str
    about: About

    @abstractmethod
    def open(self) -> tuple[Sequence[StoredFile], ExitStack]:
        """Open its files, in their order. They can be read until the stack is closed.

        Raises:
            FileNotFoundError: it is gone, or not as long as it was.
            StorageAway: its storage does not answer.
        """

    @abstractmethod
    def used_at(self) -> datetime | None:
        """Time at which the statistic was last used; None when it is gone."""

    @property
    def title(self) -> str:
        """Name of the file that is downloaded."""
        return f"{self.about.facts.statistic}-{self.address[:12]}"

    @property
    def names(self) -> Sequence[str]:
        """Names of the files that are downloaded."""
        count = len(self.about.files)
        return [f"{self.title}{f'.{number:05d}' if count > 1 else ''}.safetensors" for number in range(count)]

    @property
    def age_key(self) -> str:
        """Key that sorts by time, then by address."""
        return f"{int(self.about.created_at.timestamp() * 1_000_000):014x}-{self.address}"


class TenantStatistics(Protocol):
    """One tenant's statistics. It raises StorageAway where their storage does not answer."""

    def newest(self, after: str | None = None) -> Iterator[KeptStatistic]:
        """Yield statistics, newest first, older than the `age_key` given."""

    def get(self, address: str) -> KeptStatistic:
        """Return the statistic at an address. Raises FileNotFoundError when none is kept there."""


def in_order(found: Sequence[KeptStatistic], after: str | None) -> Iterator[KeptStatistic]:
    """Yield statistics, newest first, older than the `age_key` given."""
    for kept in sorted(found, key=lambda kept: kept.age_key, reverse=True):
        if after is None or kept.age_key < after:
            yield kept
