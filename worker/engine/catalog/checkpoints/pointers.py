"""Recognises Git LFS pointers: a few lines of text in place of a file that was not fetched with its repository.

https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from worker.engine.catalog.primitives.errors import InvalidCheckpoint

POINTER = b"version https://git-lfs.github.com/spec/v1"
WHAT_TO_DO = "a Git LFS pointer stands in its place; fetch the file itself by `git lfs pull` in its repository"


def is_pointer(start: bytes) -> bool:
    """Return whether a file that begins with these bytes is a Git LFS pointer."""
    return start.startswith(POINTER)


def refuse_pointer(name: str, start: bytes, source: str) -> None:
    """Raise InvalidCheckpoint where a file begins as a Git LFS pointer does."""
    if is_pointer(start):
        raise InvalidCheckpoint(source, f"{name} is not there: {WHAT_TO_DO}", file=name)
