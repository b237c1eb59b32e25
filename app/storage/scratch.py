"""Folders for the temporary files of processes that may be killed, which leaves their files behind."""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "maskmerge-scratch-"
YOUNG_S = 60.0  # a folder may be made and not locked yet


class Scratch:
    """A folder that is locked as long as this process lives and has not removed it.

    Making one removes the folders of processes that are gone.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            found = folder.stat(follow_symlinks=False)
            if found.st_uid != os.getuid() or time.time() - found.st_ctime < YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody works in it
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
