"""Published files, wherever they are stored."""

import mimetypes
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

MEDIA_TYPES = {".safetensors": "application/octet-stream", ".md": "text/markdown; charset=utf-8"}


class Damaged(Exception):
    """A file differs from what was written, or is missing; the message names it."""


class StoredFile(Protocol):
    """A file that never changes. Callers know it by `name`, which may hold slashes."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    @property
    def url(self) -> str | None:
        """URL at which clients can read the file themselves; None when the API must send it."""

    @property
    def modified(self) -> float:
        """Time at which it was published, in seconds since 1970."""

    def check(self) -> None:
        """Raises Damaged unless the file is there and has its length."""

    def open(self) -> BinaryIO:
        """Open the file, which stays readable after it is removed. Raises Damaged as `check` does."""


def media_type(name: str) -> str:
    suffix = "." + name.rpartition(".")[2]
    return MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def stored_bytes(files: Iterable[StoredFile]) -> int:
    """Return the number of bytes that files take. Those of equal content, as a shared backbone, are stored once."""
    return sum({file.sha256: file.bytes for file in files}.values())


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    name: str
    bytes: int
    sha256: str
    path: Path
    url: str | None = None

    @property
    def modified(self) -> float:
        return self.path.stat().st_mtime

    def check(self) -> None:
        try:
            self._check(self.path.stat())
        except OSError as error:
            raise self._missing(error) from error

    def open(self) -> BinaryIO:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._missing(error) from error
        try:
            self._check(os.fstat(descriptor))
        except Damaged:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{self.name} is no file")
        if found.st_size != self.bytes:
            raise Damaged(f"{self.name} has {found.st_size} bytes instead of {self.bytes}")

    def _missing(self, error: OSError) -> Damaged:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return Damaged(f"{self.name} is missing" if missing else f"{self.name} cannot be read: {error.strerror}")
