"""Published files that are objects."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from app.storage.files import Damaged
from app.storage.objects.bucket import PART_BYTES, Bucket, StoredObject
from app.storage.objects.errors import ObjectChanged

SIGNED_BYTES = 1 << 20  # smaller files come from the service itself, which is as fast and lets pages read them


@dataclass(frozen=True)
class ObjectFile:
    """A file that is an object.

    Args:
        modified: when it was published, in seconds since 1970.
        listed: returns the artifact's objects by key.
        signed_seconds: time for which its URL can be used; 0 where it has none.
    """

    name: str
    bytes: int
    sha256: str
    key: str
    modified: float
    bucket: Bucket = field(repr=False)
    listed: Callable[[], Mapping[str, StoredObject]] = field(repr=False)
    signed_seconds: float = 0

    @property
    def url(self) -> str | None:
        if not self.signed_seconds or self.bytes < SIGNED_BYTES:
            return None
        return self.bucket.signed(self.key, self.signed_seconds)

    @property
    def stored(self) -> StoredObject:
        """The object. Raises Damaged where it is missing or has another length."""
        found = self.listed().get(self.key)
        if found is None:
            raise Damaged(f"{self.name} is missing")
        if found.size != self.bytes:
            raise Damaged(f"{self.name} has {found.size} bytes instead of {self.bytes}")
        return found

    def check(self) -> None:
        _ = self.stored

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Reader(self), PART_BYTES)


class _Reader(io.RawIOBase):
    """Reads an object from any place, a range at a time."""

    def __init__(self, file: ObjectFile) -> None:
        self._file = file
        self._object = file.stored
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._object.size}[whence]
        self._place = start + offset
        return self._place

    def readall(self) -> bytes:
        found = bytearray()
        while part := self.read(PART_BYTES):  # by itself, Python would ask for 8 kB at a time
            found += part
        return bytes(found)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._file.bucket.read(self._object, self._place, self._place + len(buffer))
        except ObjectChanged as error:
            raise Damaged(f"{self._file.name}: {error}") from error
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
