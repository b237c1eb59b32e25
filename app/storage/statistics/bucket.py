"""Lists the statistics in object storage for people and programs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import ValidationError

from app.contracts.object_storage import Location, ObjectStorage
from app.storage.objects.bucket import AT_THE_DOOR, Bucket, StoredObject
from app.storage.objects.file import ObjectFile
from app.storage.statistics.kept import KeptStatistic, in_order
from app.storage.statistics.objects import Entry, StatisticsPlace
from worker.engine.catalog.contracts.statistics import NODE_SUMS, About


@dataclass(frozen=True)
class StatisticInBucket(KeptStatistic):
    listed: StoredObject
    """Its `.json`."""
    entry: Entry = field(repr=False)
    bucket: Bucket = field(repr=False)
    signed_seconds: float

    def open(self) -> tuple[list[ObjectFile], ExitStack]:
        objects = {one.key: one for file in self.about.files if (one := self.entry.file(file)) is not None}
        if len(objects) < len({file.sha256 for file in self.about.files}):  # who needs it measures it again
            raise FileNotFoundError(self.entry.prefix)
        files = [
            ObjectFile(
                name=name,
                bytes=file.bytes,
                sha256=file.sha256,
                key=self.entry.file_key(file),
                modified=self.about.created_at.timestamp(),
                bucket=self.bucket,
                listed=lambda: objects,
                signed_seconds=self.signed_seconds,
            )
            for name, file in zip(self.names, self.about.files, strict=True)
        ]
        return files, ExitStack()

    def used_at(self) -> datetime | None:
        return datetime.fromtimestamp(max(self.listed.written, self.about.created_at.timestamp()), UTC)


class StatisticsBucket:
    """Lists one tenant's statistics in a bucket. Each `.json` is read once, unless another takes its place."""

    def __init__(self, kept_in: Location, objects: ObjectStorage, tenant: str) -> None:
        self._place = StatisticsPlace(kept_in, objects)
        self._tenant = tenant
        self._known: dict[tuple[str, str], About | None] = {}
        self._prefixes: dict[str, str] = {}  # by address, on which they depend alone

    def newest(self, after: str | None = None) -> Iterator[KeptStatistic]:
        bucket = self._place.bucket(AT_THE_DOOR)
        entries = self._entries(bucket)
        self._prefixes = {entry.address: entry.prefix for entry in entries}
        yield from in_order(self._kept(bucket, entries), after)

    def get(self, address: str) -> KeptStatistic:
        bucket = self._place.bucket(AT_THE_DOOR)
        if address not in self._prefixes:
            self._prefixes = {entry.address: entry.prefix for entry in self._entries(bucket)}
        if address in self._prefixes:
            for kept in self._kept(bucket, self._entries(bucket, self._prefixes[address])):
                return kept
        raise FileNotFoundError(address)

    def _entries(self, bucket: Bucket, prefix: str = "") -> list[Entry]:
        return [entry for entry in self._place.entries(bucket, prefix) if self._tenant in entry.abouts]

    def _kept(self, bucket: Bucket, entries: Sequence[Entry]) -> list[KeptStatistic]:
        own = [(entry, entry.abouts[self._tenant]) for entry in entries]
        unread = [one for _, one in own if (one.key, one.etag) not in self._known]
        read = zip(unread, bucket.read_each(unread), strict=True)
        known = self._known | {(one.key, one.etag): _parsed(content) for one, content in read if content is not None}
        self._known = known
        seconds = self._place.objects.signed_seconds
        return [
            StatisticInBucket(entry.address, about, one, entry, bucket, seconds)
            for entry, one in own
            if (about := known.get((one.key, one.etag))) is not None
        ]


def _parsed(content: bytes) -> About | None:
    """Read a `.json`; None when it is a part of one to come, or a worker of another version wrote it."""
    try:
        about = About.model_validate_json(content)
    except ValidationError:
        return None
    return None if about.facts.statistic == NODE_SUMS else about
