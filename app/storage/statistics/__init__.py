"""Statistics that workers keep for later merges: in the data folder, or in object storage where artifacts are there.

obstore is loaded where it is used. `kept_in` is the place in object storage; None where the data folder has them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from app.contracts.object_storage import Location, ObjectStorage
from app.storage.statistics.folder import StatisticsFolders
from app.storage.statistics.kept import TenantStatistics

if TYPE_CHECKING:
    from app.storage.statistics.common import CommonStatistics


class KeptStatistics:
    """The statistics of every tenant, as they are listed and read."""

    def __init__(self, data_dir: Path, kept_in: Location | None, objects: ObjectStorage) -> None:
        self.folders = StatisticsFolders(data_dir)
        self._kept_in = kept_in
        self._objects = objects
        self._known: dict[str, TenantStatistics] = {}

    def of(self, tenant: str) -> TenantStatistics:
        if self._kept_in is None:
            return self.folders.of(tenant)
        if tenant not in self._known:
            from app.storage.statistics.bucket import StatisticsBucket

            self._known[tenant] = StatisticsBucket(self._kept_in, self._objects, tenant)
        return self._known[tenant]


def common_statistics(kept_in: Location | None, objects: ObjectStorage) -> "Callable[[str], CommonStatistics] | None":
    """Return what opens a tenant's statistics for one job; None where the data folder has them."""
    if kept_in is None:
        return None
    from app.storage.statistics.common import CommonStatistics

    return partial(CommonStatistics, kept_in, objects)


def sweep_statistics(kept_in: Location | None, objects: ObjectStorage, max_bytes: int) -> None:
    """Remove statistics from object storage while there are more than so many bytes. Folders are swept as they fill."""
    if kept_in is not None:
        from app.storage.statistics.objects import StatisticsPlace

        StatisticsPlace(kept_in, objects).sweep(max_bytes)
