import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


class Damaged(Exception):
    """A file differs from what was written, or is missing; the message names it."""


@dataclass(frozen=True)
class StoredFile:
    """A file that never changes. `name` is what callers know it by, and may hold slashes."""

    name: str
    bytes: int
    sha256: str
    path: Path

    def check(self) -> None:
        """Raises Damaged unless the file is there and has its length."""
        try:
            self._check(self.path.stat())
        except OSError as error:
            raise self._missing(error) from error

    def open(self) -> BinaryIO:
        """Open the file, which stays readable after it is removed. Raises Damaged as `check` does."""
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
