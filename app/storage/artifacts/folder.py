"""Published artifacts as folders, which are assembled out of sight and become visible by one rename."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from app.contracts.jobs import Attempt, TaskId
from app.storage.artifacts.store import ArtifactStore, Manifest, StoreContext
from app.storage.artifacts.work import WorkFolders
from app.storage.files import Damaged, LocalFile
from app.storage.inputs import OnBytes, RootedPath, untold
from worker.engine.catalog.contracts.report import MANIFEST

logger = logging.getLogger(__name__)


def opened(context: StoreContext) -> ArtifactStore:
    if context.place:
        raise ValueError("MASKMERGE_ARTIFACT_STORE=folder takes no place; it is MASKMERGE_DATA_DIR")
    return FolderStore(context.data_dir)


class FolderStore:
    """Keeps artifacts in `work/<job>.<attempt>` while attempts assemble them, then in `artifacts/<job>.<attempt>`."""

    def __init__(self, data_dir: Path) -> None:
        self._work = WorkFolders(data_dir.resolve() / "work")
        self._published = WorkFolders(data_dir.resolve() / "artifacts")

    def prepare(self) -> None:
        for parent in (self._work, self._published):
            parent.folder.mkdir(parents=True, exist_ok=True)

    def is_writable(self) -> bool:
        return self._work.is_writable() and self._published.is_writable()

    def free_bytes(self) -> int:
        return self._work.free_bytes()

    def assembled_bytes(self) -> int:
        return self._work.taken_bytes()

    def begin(self, attempt: Attempt) -> Path:
        self._published.remove_of_job(attempt.task.job)
        return self._work.begin(attempt)

    def publish(self, attempt: Attempt, on_bytes: OnBytes = untold) -> str:
        """Rename the folder. Files are flushed first, so that a machine's crash after that leaves no empty ones."""
        folder = self._work.of(attempt)
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        folder.rename(self._published.of(attempt))
        _flush(self._published.folder)
        return folder.name

    def discard(self, attempt: Attempt) -> None:
        for parent in (self._work, self._published):
            parent.discard(attempt)

    def remove(self, artifact: str) -> None:
        shutil.rmtree(self._published.folder / artifact, ignore_errors=True)

    def open(self, artifact: str) -> "FolderArtifact":
        return FolderArtifact(self._published.folder / artifact)

    def sweep(self, is_wanted: Callable[[TaskId, int, bool], bool]) -> int:
        removed = [
            *self._work.sweep(lambda task, number: is_wanted(task, number, False)),
            *self._published.sweep(lambda task, number: is_wanted(task, number, True)),
        ]
        for name in removed:
            logger.info("removed %s, left by an attempt that did not end", name)
        return len(removed)


class FolderArtifact:
    """A published folder, whose models may be read where they lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def files(self) -> Sequence[LocalFile]:
        if not self._folder.is_dir():
            raise FileNotFoundError(self._folder)
        path = self._folder / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Damaged(f"{MANIFEST} is missing or broken") from error
        listed = Manifest.parse(content).files
        files = [LocalFile(file.name, file.bytes, file.sha256, self._folder / file.name) for file in listed]
        return [*files, LocalFile(MANIFEST, len(content), hashlib.sha256(content).hexdigest(), path)]

    @property
    def models(self) -> Sequence[str]:
        return list(self._models)

    @contextmanager
    def inspect(self, model: str) -> Iterator[RootedPath]:
        yield self._checked(model)

    def fetch(self, model: str, on_bytes: OnBytes, held: ExitStack) -> RootedPath:
        return self._checked(model)

    @cached_property
    def _models(self) -> dict[str, Path]:
        """Folders of the models, by name: `models/<name>`, or `model` where the artifact has only one."""
        found = {path.name: path for path in sorted(self._folder.glob("models/*")) if path.is_dir()}
        if (self._folder / "model").is_dir():
            found.setdefault("model", self._folder / "model")
        return found

    def _checked(self, model: str) -> RootedPath:
        """Return a model's folder, after checking that all its files have their length."""
        path = self._models[model]
        name = path.relative_to(self._folder).as_posix()
        for file in self.files:
            if file.name.startswith(f"{name}/"):
                file.check()
        return RootedPath(path, self._folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
