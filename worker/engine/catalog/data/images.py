"""Images of rows: bytes in a cell, or a file beside the data set's own. The worker alone decodes them."""

import errno
import hashlib
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from worker.engine.catalog.checkpoints.inspection import TOO_MANY_OPEN
from worker.engine.catalog.checkpoints.views import LinkOut, open_beneath
from worker.engine.catalog.primitives.errors import InvalidDataset, Place

MAX_IMAGE_BYTES = 20_000_000
MOST_PATH_CHARACTERS = 1000


@dataclass(frozen=True)
class Cell:
    """The place of an image in a data set, for messages."""

    source: str
    place: Place
    column: str

    def refused(self, why: str) -> InvalidDataset:
        """Return the error that the column's value is not as it should be."""
        return InvalidDataset(self.source, f"column '{self.column}' {why}", self.place, column=self.column)


@dataclass(frozen=True)
class ImageFile:
    """A file that a row names by its path from the data set's folder."""

    path: str
    folder: Path
    root: Path
    """Folder in which the file must lie, whatever links lead to it."""

    def read(self, cell: Cell) -> bytes:
        """Read the file. Raises InvalidDataset where it lies elsewhere, is too large, or cannot be read."""
        try:
            with ExitStack() as opened:
                descriptor = open_beneath(self.folder / self.path, self.root, opened)
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise cell.refused("names what is not a regular file")
                if found.st_size > MAX_IMAGE_BYTES:
                    raise _too_large(cell)
                with os.fdopen(os.dup(descriptor), "rb") as stream:
                    return stream.read(MAX_IMAGE_BYTES)
        except LinkOut as error:
            raise cell.refused("names a symbolic link out of the allowed folders") from error
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:  # nothing is wrong with the file
                raise
            why = "No such file or directory" if error.errno == errno.ELOOP else error.strerror
            raise cell.refused(f"names a file that cannot be read: {why}") from error


@dataclass(frozen=True)
class Image:
    """An encoded image, known by the sha256 of its bytes. A file's bytes are not kept, and are read anew."""

    cell: Cell
    digest: str
    content: bytes | ImageFile = field(repr=False)

    def read(self) -> bytes:
        """Return the encoded bytes. Raises InvalidDataset where a file was changed since its row was read."""
        if isinstance(self.content, bytes):
            return self.content
        found = self.content.read(self.cell)
        if _digest(found) != self.digest:
            raise self.cell.refused("names a file that was changed while the job ran; post it again")
        return found


def image_of(value: object, cell: Cell, folder: Path | None, root: Path | None) -> Image:
    """Make an image of a cell: a path, bytes, or an object with `bytes`, as the hub's data sets have it.

    Args:
        folder: folder to which paths are relative; None where a data set has no files beside it.
        root: folder in which files must lie; None: `folder`.

    Raises:
        InvalidDataset: it is none of these, or the file cannot be read.
    """
    if isinstance(value, str):
        if folder is None:
            raise cell.refused("names a file, and only local data sets have files beside them; store the bytes")
        file = ImageFile(_checked(value, cell), folder, root or folder)
        return Image(cell, _digest(file.read(cell)), file)
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise cell.refused("has no bytes; of an object only these are read, never a path")
    if not isinstance(value, bytes) or not value:
        raise cell.refused("has no image: neither bytes nor the path of a file")
    if len(value) > MAX_IMAGE_BYTES:
        raise _too_large(cell)
    return Image(cell, _digest(value), value)


def _checked(path: str, cell: Cell) -> str:
    parts = PurePosixPath(path).parts
    if not parts or len(path) > MOST_PATH_CHARACTERS or "\0" in path:
        raise cell.refused("is no path of a file")
    if ".." in parts or path.startswith("/"):
        raise cell.refused("is a path out of the data set's folder; paths are relative to it, without ..")
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _too_large(cell: Cell) -> InvalidDataset:
    return cell.refused(f"is an image of more than {MAX_IMAGE_BYTES} bytes")
