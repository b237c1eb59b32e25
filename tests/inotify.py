"""Which files any process opens, as the kernel tells: also what compiled libraries open."""

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


@contextmanager
def opened(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Those of `files`, which exist, that are opened in the context; known when it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    watching = libc.inotify_init1(os.O_NONBLOCK)
    watched = {libc.inotify_add_watch(watching, os.fsencode(file), IN_OPEN): file for file in files}
    assert watching >= 0
    assert min(watched) >= 0, os.strerror(ctypes.get_errno())
    found: list[Path] = []
    try:
        yield found
        while events := _read(watching):
            while events:
                watch, _, _, length = EVENT.unpack_from(events)
                found.append(watched[watch])
                events = events[EVENT.size + length :]
    finally:
        os.close(watching)


def _read(watching: int) -> bytes:
    try:
        return os.read(watching, 1 << 16)
    except BlockingIOError:
        return b""
