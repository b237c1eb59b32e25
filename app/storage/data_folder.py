"""The data folder belongs to one service at a time."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

LOCK_WAIT_S = 15  # children of a killed supervisor are gone within a moment
TICK_S = 0.1


class DataDirInUse(Exception):
    pass


def lock(data_dir: Path, is_stopping: Callable[[], bool] = lambda: False, wait_s: float = LOCK_WAIT_S) -> int:
    """Take an exclusive lock on the data folder. It is held while the returned descriptor is open anywhere.

    Raises:
        DataDirInUse: another process holds it for longer than `wait_s`.
    """
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if is_stopping() or time.monotonic() > deadline:
                os.close(descriptor)
                raise DataDirInUse(
                    f"{data_dir} is in use by another maskmerge; stop it or use another folder"
                ) from None
            time.sleep(TICK_S)
