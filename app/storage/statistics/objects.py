"""The keys of statistics in object storage, all below one prefix of a bucket, and what is removed of them.

`statistics/<checkpoint>/<address>/` has a statistic's files by the digests of their contents, and for each tenant who
has it `<tenant>.json`, the content of `about.json`. That is written last and removed first, and readers go by it. So
nobody finds half of a statistic, and writers of the same one do not disturb each other, whatever bits they measured;
nothing depends on conditional writes. One request lists all that is kept of a checkpoint.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from app.contracts.object_storage import Location, ObjectStorage
from app.storage.objects.bucket import AT_WORK, Bucket, Patience, StoredObject
from worker.engine.catalog.contracts.statistics import ADDRESS, FOLDER, Facts, KeptFile

JSON = ".json"
ABANDONED_S = 86_400.0  # files that nobody's `.json` came after for so long were left by a killed process
RENEWED_S = 3600.0  # a use writes `.json` again when it is older, so that its time is that of the last use

logger = logging.getLogger(__name__)


@dataclass
class Entry:
    """The objects of one statistic, as they were listed."""

    prefix: str
    abouts: dict[str, StoredObject] = field(default_factory=dict)
    """Its `.json` of each tenant."""
    files: dict[str, StoredObject] = field(default_factory=dict)
    """Its files, by name."""

    @property
    def address(self) -> str:
        return self.prefix.rpartition("/")[2]

    @property
    def bytes(self) -> int:
        return sum(one.size for one in (*self.abouts.values(), *self.files.values()))

    @property
    def used(self) -> float:
        """Time of its last use, in seconds since 1970, to the hour."""
        return max(one.written for one in (*self.abouts.values(), *self.files.values()))

    def about_key(self, tenant: str) -> str:
        return f"{self.prefix}/{tenant}{JSON}"

    def file_key(self, file: KeptFile) -> str:
        return f"{self.prefix}/{file_name(file)}"

    def file(self, file: KeptFile) -> StoredObject | None:
        """Return the object of a file; None where it is gone, or has another length."""
        found = self.files.get(file_name(file))
        return None if found is None or found.size != file.bytes else found


def file_name(file: KeptFile) -> str:
    return f"{file.sha256}.safetensors"


class StatisticsPlace:
    """The place of all tenants' statistics."""

    def __init__(self, kept_in: Location, objects: ObjectStorage) -> None:
        self.objects = objects
        self._place = kept_in.below(FOLDER)

    def bucket(self, patience: Patience) -> Bucket:
        return Bucket(self._place.bucket, self.objects, patience)

    def entry(self, facts: Facts) -> Entry:
        """Return an entry without objects."""
        return Entry(f"{self.of_checkpoint(facts)}/{facts.address}")

    def of_checkpoint(self, facts: Facts) -> str:
        """Return the prefix of everything that is kept of a checkpoint."""
        return f"{self._place.key}/{facts.checkpoint.removeprefix('sha256:')}"

    def entries(self, bucket: Bucket, prefix: str = "") -> list[Entry]:
        """List what is below a prefix, by default all. Raises StorageAway."""
        found: dict[str, Entry] = {}
        for one in bucket.each(prefix or self._place.key):
            below, _, name = one.key.rpartition("/")
            if not ADDRESS.fullmatch(below.rpartition("/")[2]):
                continue
            entry = found.setdefault(below, Entry(below))
            if name.endswith(JSON):
                entry.abouts[name.removesuffix(JSON)] = one
            else:
                entry.files[name] = one
        return list(found.values())

    def sweep(self, max_bytes: int) -> int:
        """Remove what was used longest ago while there is too much, and what killed processes left; return how many.

        Processes that do so at the same time list the same, and remove the same. A statistic that is used meanwhile is
        measured again.
        """
        bucket = self.bucket(AT_WORK)
        try:
            found = sorted(self.entries(bucket), key=lambda entry: entry.used)
            total = sum(entry.bytes for entry in found)
            removed = 0
            for entry in found:
                is_left = not entry.abouts and time.time() - entry.used > ABANDONED_S
                if is_left or (total > max_bytes and entry.abouts):
                    remove(bucket, [entry])
                    total -= entry.bytes
                    removed += 1
        except OSError as error:
            logger.warning("the bucket of statistics is not swept: %s", error)
            return 0
        if removed:
            logger.info("removed %d statistics from object storage", removed)
        return removed


def remove(bucket: Bucket, entries: Iterable[Entry]) -> None:
    """Remove entries, so that nobody finds half of one. Raises StorageAway."""
    gone = list(entries)
    bucket.remove_each([one.key for entry in gone for one in entry.abouts.values()])
    bucket.remove_each([one.key for entry in gone for one in entry.files.values()])
