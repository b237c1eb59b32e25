from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredFile:
    """A file that never changes. `name` is what callers know it by, and may hold slashes."""

    name: str
    bytes: int
    sha256: str
    path: Path
