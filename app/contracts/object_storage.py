"""What the service must be told of object storage, and the names of places there."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

SCHEME = "s3:"
BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]")
LONGEST_KEY = 1024  # bytes, the limit of every such storage
UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Location:
    """A bucket, and the key of an object or the prefix of several in it; empty for the whole bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    @classmethod
    def parse(cls, text: str) -> "Location":
        """Read `BUCKET/KEY` or `BUCKET`. Raises ValueError, which says what is wrong."""
        bucket, _, key = text.partition("/")
        if not BUCKET.fullmatch(bucket):
            raise ValueError(f"'{bucket[:100]}' is no name of a bucket")
        key = key.removesuffix("/")
        if UNSPEAKABLE.search(key) or len(key.encode(errors="replace")) > LONGEST_KEY:
            raise ValueError("a key has at most 1,024 bytes, and no control characters")
        if key and any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError("a key has no empty parts, and none that is '.' or '..'")
        return cls(bucket, key)

    def covers(self, other: "Location") -> bool:
        """Return whether the other place is this one, or lies below it."""
        return self.bucket == other.bucket and (self.key in ("", other.key) or other.key.startswith(f"{self.key}/"))

    def below(self, name: str) -> "Location":
        return Location(self.bucket, f"{self.key}/{name}" if self.key else name)


class ObjectStorage(BaseModel):
    """The settings of object storage. They hold no secret: keys are in the environment, or in the file named."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    buckets: tuple[str, ...] = ()
    """Buckets, each with a prefix or without, whose objects `s3:` references may name."""
    endpoint: str | None = None
    public_endpoint: str | None = None
    region: str | None = None
    credentials_file: Path | None = None
    signed_seconds: float = 900
    max_cache_bytes: int = 50_000_000_000


NO_BUCKETS = ObjectStorage()
"""Settings of a service that reads no object storage."""
