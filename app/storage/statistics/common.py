"""Statistics that machines have in common, as a job finds and keeps them by their facts.

The engine keeps all statistics in a folder of its machine. This is beyond it: what the folder has not is fetched from
here, and what is measured or used there is uploaded to here.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.contracts.object_storage import Location, ObjectStorage
from app.storage.files import media_type
from app.storage.inputs import untold
from app.storage.objects.bucket import AT_WORK, IN_PASSING, StoredObject
from app.storage.objects.errors import ObjectChanged, StorageAway
from app.storage.statistics.objects import RENEWED_S, Entry, StatisticsPlace, file_name, remove
from worker.engine.catalog.contracts.statistics import ABOUT, About, Facts
from worker.engine.catalog.primitives.errors import StorageError

MOST_ABOUT_BYTES = 16_000_000

logger = logging.getLogger(__name__)


class CommonStatistics:
    """One tenant's statistics, for one job. What is there of a checkpoint is listed once.

    What others keep after that is measured here too, and kept a second time. A statistic of another tenant is found by
    its facts: who knows them has the same inputs.

    Every function raises StorageError where the bucket does not answer, or refuses.
    """

    def __init__(self, kept_in: Location, objects: ObjectStorage, tenant: str) -> None:
        self._place = StatisticsPlace(kept_in, objects)
        self._bucket = self._place.bucket(AT_WORK)
        self._tenant = tenant
        self._listed: dict[str, dict[str, Entry]] = {}

    def holds(self, facts: Facts) -> bool:
        """Return whether there is a statistic with these facts, readable or not."""
        with _translated():
            return bool(self._entry(facts).abouts)

    def about(self, facts: Facts) -> About | None:
        """Return what a statistic with these facts says of itself; None when there is none that says so."""
        with _translated():
            entry = self._entry(facts)
            for tenant in sorted(entry.abouts, key=lambda tenant: (tenant != self._tenant, tenant)):
                try:
                    content, _ = self._bucket.read_whole(entry.about_key(tenant), MOST_ABOUT_BYTES)
                    about = About.model_validate_json(content)
                except (FileNotFoundError, ValueError):  # it was removed, or is damaged
                    continue
                return about if tenant == self._tenant else about.for_another_tenant()
            self._forget(facts)
        return None

    def fetch(self, facts: Facts, folder: Path) -> bool:
        """Download a statistic with these facts into an empty folder; returns False when none is whole."""
        about = self.about(facts)
        if about is None:
            return False
        with _translated():
            entry = self._entry(facts)
            wanted = {folder / file.name: one for file in about.files if (one := entry.file(file)) is not None}
            if len(wanted) < len(about.files):  # its removal was cut off
                return False
            try:
                self._bucket.download(wanted, untold)
            except ObjectChanged:  # it was removed just now
                self._forget(facts)
                return False
        (folder / ABOUT).write_text(about.model_dump_json(indent=1), encoding="utf-8")
        return True

    def keep(self, facts: Facts, folder: Path, about: About) -> None:
        """Upload a statistic from its folder unless it is there, and let its last use be now."""
        with _translated():
            entry = self._entry(facts)
            missing = [file for file in about.files if entry.file(file) is None]
            own = entry.abouts.get(self._tenant)
            if not missing and own is not None and time.time() - own.written < RENEWED_S:
                return
            try:
                for file in missing:
                    key = entry.file_key(file)
                    self._bucket.upload(key, folder / file.name, media_type(file.name), lambda _: None)
                    entry.files[file_name(file)] = StoredObject(key, file.bytes, "", time.time())
                key = entry.about_key(self._tenant)
                self._bucket.upload(key, folder / ABOUT, media_type(ABOUT), lambda _: None)
                entry.abouts[self._tenant] = StoredObject(key, 0, "", time.time())
            except FileNotFoundError:  # another process has just removed the folder, for want of room
                logger.warning("the statistic %s was removed while it was uploaded", facts.address)

    def remove(self, each: Iterable[Facts]) -> None:
        """Remove statistics, if the bucket answers at once; otherwise a sweep does it, when they are not used."""
        with _translated():
            found = {facts.address: facts for facts in each if self._entry(facts).abouts}
        if not found:
            return
        try:
            remove(self._place.bucket(IN_PASSING), [self._entry(facts) for facts in found.values()])
        except StorageAway as error:
            logger.warning("statistics are left to a sweep: %s", error)
        for facts in found.values():
            self._forget(facts)

    def _forget(self, facts: Facts) -> None:
        """Take it that nothing of a statistic is there, so that all of it is uploaded when it is kept."""
        self._listed[facts.checkpoint][facts.address] = self._place.entry(facts)

    def _entry(self, facts: Facts) -> Entry:
        if facts.checkpoint not in self._listed:
            entries = self._place.entries(self._bucket, self._place.of_checkpoint(facts))
            self._listed[facts.checkpoint] = {entry.address: entry for entry in entries}
        return self._listed[facts.checkpoint].setdefault(facts.address, self._place.entry(facts))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except StorageAway as error:
        raise StorageError(f"statistics cannot be kept or found: {error}; try again") from error
