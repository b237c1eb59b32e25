"""The interface of every store of artifacts.

An attempt assembles its artifact in a folder of this machine, and publishes it whole: readers see all of it or nothing.
The job's record says which attempt's artifact is the job's. An artifact that no record names is swept.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, Field, ValidationError, field_validator

from app.contracts.jobs import Attempt, TaskId
from app.contracts.object_storage import ObjectStorage
from app.storage.files import Damaged, StoredFile
from app.storage.inputs import OnBytes, RootedPath, untold
from worker.engine.catalog.contracts.report import MANIFEST


class Artifact(Protocol):
    """A published artifact. Nothing of it is read before it is asked for.

    Raises:
        FileNotFoundError: there is no such artifact.
        Damaged: its manifest is not what was written, or a file is missing or has another length.
    """

    @property
    def files(self) -> Sequence[StoredFile]:
        """All files, as the manifest lists them, itself last. It is read once; the files are not looked at yet."""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models, each a checkpoint."""

    def inspect(self, model: str) -> AbstractContextManager[RootedPath]:
        """Provide a folder with the files from which a model's headers are read; weight files may be headers alone."""

    def fetch(self, model: str, on_bytes: OnBytes, held: ExitStack) -> RootedPath:
        """Provide a folder with all files of a model, which stays until `held` is closed."""


class ArtifactStore(Protocol):
    """A store in which artifacts are published. It raises OSError when it cannot be written or read."""

    def prepare(self) -> None:
        """Make the store ready for use."""

    def is_writable(self) -> bool: ...

    def free_bytes(self) -> int:
        """Return the number of bytes that further artifacts may take."""

    def assembled_bytes(self) -> int:
        """Return the number of these that attempts have taken which are not published yet."""

    def begin(self, attempt: Attempt) -> Path:
        """Make an empty folder, private to the attempt, and remove whatever earlier attempts of the job left."""

    def publish(self, attempt: Attempt, on_bytes: OnBytes = untold) -> str:
        """Make the whole of the attempt's folder readable by a name, and return that name.

        Args:
            on_bytes: called often where it takes long. Where it raises, nothing is published.
        """

    def discard(self, attempt: Attempt) -> None:
        """Remove whatever the attempt left, published or not."""

    def open(self, artifact: str) -> Artifact: ...

    def remove(self, artifact: str) -> None:
        """Remove the artifact of a job that is forgotten."""

    def sweep(self, is_wanted: Callable[[TaskId, int, bool], bool]) -> int:
        """Remove what crashes left, and return how many. `is_wanted(task, attempt, published)` says what stays."""


class ManifestFile(BaseModel):
    """An entry of a manifest, with the fields that are read here."""

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

    @classmethod
    def parse(cls, content: bytes) -> "Manifest":
        """Read a manifest. Raises Damaged."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise Damaged(f"{MANIFEST} is missing or broken") from error


@dataclass(frozen=True)
class StoreContext:
    """The things that a store needs when it is opened."""

    data_dir: Path
    place: str
    """What the setting says after the store's name."""
    objects: ObjectStorage
    waiting: Callable[[], AbstractContextManager[None]]
    """Makes a context that is entered while another machine is waited for."""


def artifact_name(attempt: Attempt) -> str:
    return f"{attempt.task.job}.{attempt.number}"
