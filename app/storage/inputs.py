"""Places of inputs on this machine, and the reports of fetching them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnBytes = Callable[[int, int], None]
"""Called with the number of bytes fetched and the number in all. It raises when nobody wants them any more."""


def untold(done: int, total: int) -> None:
    """Be told of bytes by a call that nobody waits for."""


@dataclass(frozen=True)
class RootedPath:
    """A checkpoint's folder or a file of rows, and the folder that its links must not lead out of."""

    path: Path
    root: Path
