"""A source as object storage will be one: read by ranges, fetched into a cache. Its buckets are local folders.

Tests lay it beside the sources of the service; that this one file is all they add is what they show.
"""

import hashlib
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from app.contracts.references import Reference, ReferenceError
from app.storage.inputs import OnBytes, RootedPath
from app.storage.sources.source import FetchedInput, InputKind, Source, SourceContext, SourceUnavailable
from worker.engine.catalog.checkpoints.files import WEIGHTS
from worker.engine.catalog.checkpoints.info import CheckpointInfo

IS_REMOTE = True
CHUNK_BYTES = 4096
SLOW = "slow"
"""Name of a bucket from which a chunk takes half a second."""
AWAY = "away"
"""Name of a bucket that can be inspected and not be fetched from."""


def opened(context: SourceContext) -> Source:
    return Buckets(context.data_dir)


class Buckets:
    def __init__(self, data_dir: Path) -> None:
        self._buckets = data_dir / "buckets"
        self._cache = data_dir / "cache"

    def resolve(self, reference: Reference, kind: InputKind) -> Reference:
        return reference

    @contextmanager
    def inspect(self, reference: Reference) -> Iterator[RootedPath]:
        with TemporaryDirectory() as name:
            outline = Path(name)
            for path in self._objects(reference):
                with path.open("rb") as stream, (outline / path.name).open("wb") as copy:
                    size = path.stat().st_size
                    if path.name == WEIGHTS:
                        prefix = stream.read(8)
                        copy.write(prefix + stream.read(struct.unpack("<Q", prefix)[0]))
                        copy.truncate(size)
                    else:
                        copy.write(stream.read(size))
            yield RootedPath(outline, outline)

    @contextmanager
    def inspect_rows(self, reference: Reference) -> Iterator[RootedPath | None]:
        yield None

    def fetch(self, reference: Reference, kind: InputKind, state: str | None, on_bytes: OnBytes) -> FetchedInput:
        if reference.rest.startswith(f"{AWAY}/"):
            raise SourceUnavailable(f"the storage of {reference} does not answer")
        if state not in (None, self._state(reference)):
            raise ReferenceError(f"'{reference}' was changed after the job was accepted; post it again")
        objects = self._objects(reference)
        total, done = sum(path.stat().st_size for path in objects), 0
        folder = self._cache / reference.rest
        folder.mkdir(parents=True, exist_ok=True)
        for path in objects:
            with path.open("rb") as stream, (folder / path.name).open("wb") as copy:
                while chunk := stream.read(CHUNK_BYTES):
                    copy.write(chunk)
                    done += len(chunk)
                    on_bytes(done, total)
                    if reference.rest.startswith(f"{SLOW}/"):
                        time.sleep(0.5)
        place = folder if kind == "checkpoint" else folder / objects[0].name
        return FetchedInput(RootedPath(place, self._cache))

    def state(self, info: CheckpointInfo) -> str | None:
        return self._state(Reference.parse(info.source))

    def put(self, reference: str, source: Path) -> None:
        """Store a folder's files, or one file, under a reference."""
        folder = self._buckets / Reference.parse(reference).rest
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir() if source.is_dir() else [source]:
            shutil.copyfile(path, folder / path.name)

    def _objects(self, reference: Reference) -> list[Path]:
        folder = self._buckets / reference.rest
        if not folder.is_dir():
            raise ReferenceError(f"'{reference}' is not there")
        return sorted(folder.iterdir())

    def _state(self, reference: Reference) -> str:
        """As from the ETags of objects."""
        digest = hashlib.sha256()
        for path in self._objects(reference):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()
