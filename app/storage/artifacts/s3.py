"""Published artifacts as objects, all below one prefix of a bucket.

An artifact is `artifacts/<job>/<attempt>/`, with its files' names as keys. Its manifest is uploaded last and removed
first, and readers go by it; so nobody sees half of one, and nothing depends on conditional writes. A file of several
names, as a backbone that models share, is uploaded once, under the first of them.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from app.contracts.jobs import Attempt, TaskId
from app.contracts.object_storage import Location
from app.storage.artifacts.store import ArtifactStore, Manifest, StoreContext, artifact_name
from app.storage.artifacts.work import WorkFolders, attempt_named
from app.storage.files import Damaged, StoredFile, media_type
from app.storage.inputs import OnBytes, RootedPath, untold
from app.storage.objects.bucket import AT_THE_DOOR, AT_WORK, IN_PASSING, Bucket, Patience, StoredObject
from app.storage.objects.cache import ObjectCache
from app.storage.objects.errors import ObjectChanged
from app.storage.objects.file import ObjectFile
from app.storage.outlines import write_outline
from worker.engine.catalog.contracts.report import MANIFEST

FOLDER = "artifacts"
MODELS = "models/"
ONLY_MODEL = "model"
MOST_MANIFEST_BYTES = 64_000_000
REMEMBERED_S = 5.0  # whether the bucket answers, which readiness asks for again and again

logger = logging.getLogger(__name__)


def opened(context: StoreContext) -> ArtifactStore:
    try:
        place = Location.parse(context.place)
    except ValueError as error:
        raise ValueError(f"MASKMERGE_ARTIFACT_STORE: {error}; write s3:BUCKET/PREFIX") from error
    return ObjectStore(context, place)


class ObjectStore:
    """Keeps artifacts in a bucket. Attempts assemble them in `work/<job>.<attempt>` of the data folder."""

    def __init__(self, context: StoreContext, place: Location) -> None:
        self._work = WorkFolders(context.data_dir.resolve() / "work")
        self._context = context
        self._place = place.below(FOLDER)
        self._begun: set[str] = set()  # artifacts of which something may have been uploaded here
        self._asked = (0.0, False)

    def prepare(self) -> None:
        self._work.folder.mkdir(parents=True, exist_ok=True)

    def is_writable(self) -> bool:
        asked, answered = self._asked
        if time.monotonic() - asked > REMEMBERED_S or not asked:
            try:
                next(self._bucket(IN_PASSING).keys(f"{self._place.key}/0"), None)
                answered = True
            except OSError as error:
                logger.warning("artifacts cannot be read or written: %s", error)
                answered = False
            self._asked = time.monotonic(), answered
        return answered and self._work.is_writable()

    def free_bytes(self) -> int:
        return self._work.free_bytes()

    def assembled_bytes(self) -> int:
        return self._work.taken_bytes()

    def begin(self, attempt: Attempt) -> Path:
        self._remove(attempt.task.job)
        return self._work.begin(attempt)

    def publish(self, attempt: Attempt, on_bytes: OnBytes = untold) -> str:
        """Upload the folder's files, then its manifest."""
        folder, name = self._work.of(attempt), artifact_name(attempt)
        manifest = (folder / MANIFEST).read_bytes()
        files = _once(Manifest.parse(manifest))
        total, done = sum(files.values()) + len(manifest), 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            on_bytes(done, total)

        self._begun.add(name)
        bucket = self._bucket(AT_WORK)
        for file in files:
            bucket.upload(self._key(name, file), folder / file, media_type(file), tell)
        bucket.upload(self._key(name, MANIFEST), folder / MANIFEST, media_type(MANIFEST), tell)
        self._work.discard(attempt)
        return name

    def discard(self, attempt: Attempt) -> None:
        """Remove what is here at once; what is in the bucket, if it answers at once, or else by a sweep."""
        self._work.discard(attempt)
        if artifact_name(attempt) in self._begun:
            self.remove(artifact_name(attempt))

    def remove(self, artifact: str) -> None:
        self._remove(artifact.replace(".", "/"))
        self._begun.discard(artifact)

    def open(self, artifact: str) -> "ObjectArtifact":
        return ObjectArtifact(self._context, self._bucket(AT_THE_DOOR), self._key(artifact, "").removesuffix("/"))

    def sweep(self, is_wanted: Callable[[TaskId, int, bool], bool]) -> int:
        removed = self._work.sweep(lambda task, number: is_wanted(task, number, False))
        prefix = f"{self._place.key}/"
        try:  # all keys are listed, since a request answers for a thousand of them, and would for one job
            keys = (key.removeprefix(prefix) for key in self._bucket(AT_WORK).keys(self._place.key))
            for name in sorted({".".join(key.split("/")[:2]) for key in keys}):
                found = attempt_named(name)
                if found is not None and not is_wanted(*found, True):
                    self._remove_below(AT_WORK, name.replace(".", "/"))
                    removed.append(name)
        except OSError as error:
            logger.warning("the bucket of artifacts is not swept: %s", error)
        for name in removed:
            logger.info("removed %s, left by an attempt that did not end", name)
        return len(removed)

    def _remove(self, name: str) -> None:
        """Remove objects, if the bucket answers at once; otherwise the next sweep does it."""
        try:
            self._remove_below(IN_PASSING, name)
        except OSError as error:
            logger.warning("what is below %s is left to the next sweep: %s", name, error)

    def _bucket(self, patience: Patience) -> Bucket:
        return Bucket(self._place.bucket, self._context.objects, patience)

    def _key(self, artifact: str, file: str) -> str:
        job, _, number = artifact.partition(".")
        return f"{self._place.key}/{job}/{number}/{file}"

    def _remove_below(self, patience: Patience, name: str) -> None:
        """Remove every object below a name, manifests first, so that nobody finds half of an artifact."""
        bucket = self._bucket(patience)
        keys = [one.key for one in bucket.objects(f"{self._place.key}/{name}")]
        bucket.remove(sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")))


class ObjectArtifact:
    """A published artifact. Its manifest is read once, and its objects are listed once."""

    def __init__(self, context: StoreContext, bucket: Bucket, prefix: str) -> None:
        self._context = context
        self._bucket = bucket
        self._prefix = prefix

    @cached_property
    def files(self) -> Sequence[StoredFile]:
        with self._context.waiting():
            content, written = self._bucket.read_whole(self._key(MANIFEST), MOST_MANIFEST_BYTES)
        listed = Manifest.parse(content).files
        first: dict[str, str] = {}
        files = [
            self._file(file.name, file.bytes, file.sha256, first.setdefault(file.sha256, file.name), written)
            for file in listed
        ]
        digest = hashlib.sha256(content).hexdigest()
        return [*files, self._file(MANIFEST, len(content), digest, MANIFEST, written)]

    @property
    def models(self) -> Sequence[str]:
        return list(self._models)

    @contextmanager
    def inspect(self, model: str) -> Iterator[RootedPath]:
        objects = self._objects_of(model)

        def read(name: str, begin: int, end: int) -> bytes:
            with self._context.waiting(), _intact():
                return self._bucket.read(objects[name], begin, end)

        with TemporaryDirectory(prefix="maskmerge-outline-") as name:
            folder = Path(name)
            sizes = {file: one.size for file, one in objects.items()}
            write_outline(f"{self._prefix}/{model}", sizes, folder, read)
            yield RootedPath(folder, folder)

    def fetch(self, model: str, on_bytes: OnBytes, held: ExitStack) -> RootedPath:
        cache = ObjectCache(self._context.data_dir, self._context.objects, held)
        with _intact():
            return cache.fetch(self._bucket.name, self._objects_of(model), on_bytes)

    @cached_property
    def _models(self) -> Mapping[str, str]:
        """Prefixes of the models' files, by model: `models/<name>/`, or `model/` where the artifact has only one."""
        names = [file.name for file in self.files]
        found = {name.split("/")[1] for name in names if name.startswith(MODELS) and name.count("/") > 1}
        models = {name: f"{MODELS}{name}/" for name in sorted(found)}
        if any(name.startswith(f"{ONLY_MODEL}/") for name in names):
            models.setdefault(ONLY_MODEL, f"{ONLY_MODEL}/")
        return models

    @cached_property
    def _objects(self) -> Mapping[str, StoredObject]:
        with self._context.waiting():
            return {one.key: one for one in self._bucket.objects(self._prefix)}

    def _objects_of(self, model: str) -> dict[str, StoredObject]:
        """Return a model's objects, by the names that its files have in its folder. Raises Damaged."""
        prefix = self._models[model]
        found = {}
        for file in self.files:
            if file.name.startswith(prefix):
                file.check()
                assert isinstance(file, ObjectFile)  # noqa: S101 - for the type checker
                found[file.name.removeprefix(prefix)] = file.stored
        return found

    def _file(self, name: str, size: int, sha256: str, first: str, written: float) -> ObjectFile:
        return ObjectFile(
            name=name,
            bytes=size,
            sha256=sha256,
            key=self._key(first),
            modified=written,
            bucket=self._bucket,
            listed=lambda: self._objects,
            signed_seconds=self._context.objects.signed_seconds,
        )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _once(manifest: Manifest) -> dict[str, int]:
    """Return the sizes of the files by name, those of equal content under the first name alone."""
    first = {file.sha256: file for file in reversed(manifest.files)}
    return {file.name: file.bytes for file in manifest.files if first[file.sha256] is file}


@contextmanager
def _intact() -> Iterator[None]:
    try:
        yield
    except ObjectChanged as error:
        raise Damaged(f"{error}, though artifacts never change") from error
