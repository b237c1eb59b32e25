"""Published artifacts as folders: assembled out of sight, visible by one rename."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError, field_validator

from app.contracts.jobs import Attempt, Record, Stage, TaskId
from app.storage.files import Damaged, StoredFile
from worker.engine.catalog.contracts.report import MANIFEST

logger = logging.getLogger(__name__)


class ManifestFile(BaseModel):
    """The fields of a manifest's entry that are read here."""

    name: Annotated[str, Field(pattern=r"^[^/\x00]+(/[^/\x00]+)*$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("name")
    @classmethod
    def _stays_below(cls, name: str) -> str:
        if {".", ".."} & set(name.split("/")):
            raise ValueError("leads out of its folder")
        return name


class Manifest(BaseModel):
    files: list[ManifestFile]


class ArtifactFolder:
    """`work/<job>.<attempt>` while an attempt assembles, `artifacts/<job>.<attempt>` once published.

    The record says which attempt's folder is the job's; a folder that no record names is nobody's and is swept.
    """

    def __init__(self, data_dir: Path) -> None:
        self._work = data_dir.resolve() / "work"
        self._published = data_dir.resolve() / "artifacts"

    def prepare(self) -> None:
        """Raises OSError when the data folder cannot be written."""
        for folder in (self._work, self._published):
            folder.mkdir(parents=True, exist_ok=True)

    def is_writable(self) -> bool:
        return all(folder.is_dir() and os.access(folder, os.W_OK) for folder in (self._work, self._published))

    def free_bytes(self) -> int:
        """Room for further artifacts."""
        return shutil.disk_usage(self._work).free

    def begin(self, attempt: Attempt) -> Path:
        """An empty folder, private to the attempt; what earlier attempts left is removed."""
        for parent in (self._work, self._published):
            for earlier in parent.glob(f"{attempt.task.job}.*"):
                shutil.rmtree(earlier, ignore_errors=True)
        folder = self._work / _name(attempt)
        folder.mkdir(parents=True)
        return folder

    def publish(self, attempt: Attempt) -> str:
        """Make the attempt's folder readable by its name, which is returned; all of it or nothing.

        Files are flushed first, so that a machine's crash after the rename leaves no empty ones.
        """
        name = _name(attempt)
        folder = self._work / name
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        (self._work / name).rename(self._published / name)
        _flush(self._published)
        return name

    def discard(self, attempt: Attempt) -> None:
        """Remove whatever the attempt left, published or not."""
        for parent in (self._work, self._published):
            shutil.rmtree(parent / _name(attempt), ignore_errors=True)

    def remove(self, record: Record) -> None:
        """Remove the artifact of a job that is forgotten, if it has one."""
        if record.artifact is not None:
            shutil.rmtree(self._published / record.artifact, ignore_errors=True)

    def files(self, artifact: str) -> list[StoredFile]:
        """Every file of a published artifact, from its manifest, which is the last of them. None is looked at yet.

        Raises:
            FileNotFoundError: there is no such artifact.
            Damaged: its manifest is not what was written.
        """
        folder = self._published / artifact
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
            manifest = Manifest.model_validate_json(content)
        except (OSError, ValidationError) as error:
            raise Damaged(f"{MANIFEST} is missing or broken") from error
        files = [StoredFile(file.name, file.bytes, file.sha256, folder / file.name) for file in manifest.files]
        return [*files, StoredFile(MANIFEST, len(content), hashlib.sha256(content).hexdigest(), path)]

    def check(self, artifact: str, part: Path) -> None:
        """Check the files below a folder of the artifact. Raises as `files`, and Damaged when a length differs."""
        name = part.relative_to(self._published / artifact).as_posix()
        for file in self.files(artifact):
            if file.name.startswith(f"{name}/"):
                file.check()

    def folder(self, artifact: str) -> Path:
        """The folder of a published artifact."""
        return self._published / artifact

    def models(self, artifact: str) -> dict[str, Path]:
        """Folders of a published artifact's models, by name: `models/<name>`, and `model` where it has but one."""
        folder = self.folder(artifact)
        found = {path.name: path for path in sorted(folder.glob("models/*")) if path.is_dir()}
        if (folder / "model").is_dir():
            found.setdefault("model", folder / "model")
        return found

    def sweep(self, is_wanted: Callable[[TaskId, int, bool], bool]) -> int:
        """Remove folders that crashes left; `is_wanted(task, attempt, published)` says which stay. How many went."""
        removed = 0
        for parent in (self._work, self._published):
            for folder in parent.iterdir() if parent.is_dir() else ():
                job, dot, number = folder.name.partition(".")
                if dot and number.isdigit():
                    task = TaskId(job=job, stage=Stage.MERGE)
                    if not is_wanted(task, int(number), parent is self._published):
                        logger.info("removing %s, left by an attempt that did not end", folder.name)
                        shutil.rmtree(folder, ignore_errors=True)
                        removed += 1
        return removed


def _name(attempt: Attempt) -> str:
    return f"{attempt.task.job}.{attempt.number}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
