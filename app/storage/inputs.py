"""Where inputs lie on this machine, and how fetching them is reported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnBytes = Callable[[int, int], None]
"""Is called with the bytes that are fetched and those in all. It raises when nobody wants them any more."""


@dataclass(frozen=True)
class RootedPath:
    """A checkpoint's folder or a file of rows, and the folder that its links must not lead out of."""

    path: Path
    root: Path
