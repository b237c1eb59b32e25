"""`s3:BUCKET/PREFIX`: objects in the buckets that the operator allows, in any storage that speaks S3's protocol."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from app.contracts.object_storage import Location, ObjectStorage
from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.objects.bucket import AT_THE_DOOR, AT_WORK, Bucket, StoredObject
from app.storage.objects.cache import ObjectCache
from app.storage.objects.errors import Forbidden, NoBucket, ObjectChanged, StorageAway
from app.storage.objects.rows import first_rows
from app.storage.outlines import write_header, write_outline
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext, StorageUnavailable
from app.storage.tenants import PLACEHOLDER
from worker.engine.catalog.checkpoints.files import described_files, weights_among
from worker.engine.catalog.checkpoints.info import CheckpointInfo
from worker.engine.catalog.checkpoints.limits import MAX_HEADER_BYTES

IS_REMOTE = True
Listed = Mapping[str, StoredObject]
"""Objects by their names below a reference; of a single object, its own name."""


def opened(context: SourceContext) -> Source:
    allowed = [Location.parse(place.replace(PLACEHOLDER, context.tenant)) for place in context.objects.buckets]
    cache = ObjectCache(context.data_dir, context.objects, context.held)
    return ObjectSource(allowed, context.objects, cache, context.waiting)


class ObjectSource:
    """Finds objects in buckets. Of each input, what was listed first counts: reading anything else is an error.

    Args:
        allowed: places below which references may lie.
        waiting: see `SourceContext`.
    """

    def __init__(
        self,
        allowed: list[Location],
        settings: ObjectStorage,
        cache: ObjectCache,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._allowed = allowed
        self._settings = settings
        self._cache = cache
        self._waiting = waiting
        self._listed: dict[Reference, Listed] = {}
        self._read: dict[Reference, Listed] = {}

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        place = self._location(reference)
        if kind == "rows" and not Path(place.key).suffix:
            raise ReferenceError(f"'{reference}' is no file of rows; name the object, such as {place}/train.jsonl")
        return Reference.parse(str(place))

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        place = self._location(reference)
        with TemporaryDirectory(prefix="maskmerge-outline-") as name:
            folder = Path(name)
            with self._asking(reference):
                bucket = self._bucket(place, at_the_door=True)
                listed = self._list(reference, bucket)
                sizes = {one: found.size for one, found in listed.items()}

                def read(name: str, begin: int, end: int) -> bytes:
                    with self._waiting():
                        return bucket.read(listed[name], begin, end)

                if _is_one(place, listed):
                    [single] = listed
                    write_header(single, sizes[single], folder, read)
                    found = folder / single
                    self._read[reference] = listed
                else:
                    write_outline(str(reference), sizes, folder, read)
                    found = folder
                    self._read[reference] = _files_read(listed, lambda name: (folder / name).read_bytes())
            yield RootedPath(found, folder)

    @contextmanager
    def inspect_rows(self, reference: Reference) -> Iterator[RootedPath | None]:
        place = self._location(reference)
        with TemporaryDirectory(prefix="maskmerge-rows-") as name:
            folder = Path(name)
            with self._asking(reference):
                bucket = self._bucket(place, at_the_door=True)
                self._read[reference] = self._list(reference, bucket)
                one = self._row_file(reference, self._read[reference])
                path = folder / Path(one.key).name

                def read(begin: int, end: int) -> bytes:
                    with self._waiting():
                        return bucket.read(one, begin, end)

                is_there = first_rows(path, one.size, read)
            yield RootedPath(path, folder) if is_there else None

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        place = self._location(reference)
        with self._asking(reference):
            bucket = self._bucket(place)
            listed = self._list(reference, bucket)
            if kind == "rows":
                self._row_file(reference, listed)
            elif not _is_one(place, listed):
                index = listed
                listed = _files_read(index, lambda name: bucket.read(index[name], 0, MAX_HEADER_BYTES))
            _check_state(reference, listed, state)
            found = self._cache.fetch(place.bucket, listed, on_bytes)
        if _is_one(place, listed):
            [name] = listed
            return FetchedInput(RootedPath(found.path / name, found.root))
        return FetchedInput(found)

    def state(self, reference: Reference, info: CheckpointInfo | None) -> str | None:
        found = {name: [one.size, one.etag] for name, one in self._read[reference].items()}
        return json.dumps(found, separators=(",", ":"))

    def _location(self, reference: Reference) -> Location:
        """Return the place that a reference names. Raises ReferenceError where the caller may not name it."""
        try:
            place = Location.parse(reference.rest)
        except ValueError as error:
            raise ReferenceError(f"'{str(reference)[:200]}': {error}; write s3:BUCKET/PREFIX") from error
        if not place.key:
            raise ReferenceError(f"'{reference}' is a whole bucket; write s3:BUCKET/PREFIX")
        if not self._allowed:
            raise ReferenceError("this service reads no buckets; its operator names them in MASKMERGE_S3_BUCKETS")
        if not any(allowed.covers(place) for allowed in self._allowed):
            raise ReferenceError(f"'{reference}' is in no place that this service may read for you")
        return place

    def _bucket(self, place: Location, *, at_the_door: bool = False) -> Bucket:
        return Bucket(place.bucket, self._settings, AT_THE_DOOR if at_the_door else AT_WORK)

    def _list(self, reference: Reference, bucket: Bucket) -> Listed:
        """Return the objects below a reference, or the one that it names. Raises ReferenceError, StorageAway."""
        if reference not in self._listed:
            place = self._location(reference)
            with self._waiting():
                try:
                    below = bucket.objects(place.key)
                except ValueError as error:
                    raise ReferenceError(f"'{reference}': {error}; name the checkpoint's own prefix") from error
                found = {one.key.removeprefix(f"{place.key}/"): one for one in below if one.key != place.key}
                if not found:
                    found = {Path(place.key).name: bucket.head(place.key)}
            self._listed[reference] = found
        return self._listed[reference]

    def _row_file(self, reference: Reference, listed: Listed) -> StoredObject:
        place = self._location(reference)
        if not _is_one(place, listed):
            raise ReferenceError(f"'{reference}' is a folder; a data set is one file, so name its object")
        [one] = listed.values()
        return one

    @contextmanager
    def _asking(self, reference: Reference) -> Iterator[None]:
        """Turn what is wrong with storage and objects into the errors of a source."""
        try:
            yield
        except NoBucket as error:
            raise ReferenceError(f"'{reference}': {error}") from error
        except FileNotFoundError as error:
            raise ReferenceError(f"'{reference}': there is no such object, and none below it") from error
        except ObjectChanged as error:
            raise ReferenceError(f"'{reference}': {error} while it was read; post the job again") from error
        except Forbidden as error:
            raise ReferenceError(f"'{reference}': {error}") from error
        except StorageAway as error:
            raise StorageUnavailable(f"{reference}: {error}") from error


def _is_one(place: Location, listed: Listed) -> bool:
    """Return whether what was listed is the object of that name itself, and nothing below it."""
    return [one.key for one in listed.values()] == [place.key]


def _files_read(listed: Listed, read: Callable[[str], bytes]) -> Listed:
    """Return those objects that readers of a checkpoint open; `read` returns the content of one."""
    names = {*described_files(listed), *weights_among(listed, read)}
    return {name: listed[name] for name in sorted(names)}


def _check_state(reference: Reference, listed: Listed, state: str | None) -> None:
    """Raise ReferenceError where an object is not the one that the job was accepted with, and name it."""
    if state is None:
        return
    accepted = json.loads(state)
    for name in {**accepted, **listed}:
        if name not in listed:
            what = "is gone"
        elif name not in accepted:
            what = "was added"
        elif [listed[name].size, listed[name].etag] != accepted[name]:
            what = "was changed"
        else:
            continue
        raise ReferenceError(f"'{reference}': {name} {what} after the job was accepted; post it again")
