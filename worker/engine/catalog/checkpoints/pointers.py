"""Recognises what stands in the place of a file that was not fetched: a pointer to it, or a web page about it.

Pointers are those of Git LFS (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md) and of git-annex
(https://git-annex.branchable.com/internals/pointer_file/).
"""

import re

from worker.engine.catalog.primitives.errors import InvalidCheckpoint

BEGINNING = 512
"""Number of bytes of a file that tell."""
ANNEXED = "a git-annex pointer stands in its place; fetch the file itself by `git annex get` in its repository"
STAND_INS = (
    (
        re.compile(rb"version https://git-lfs\.github\.com/spec/v1"),
        "a Git LFS pointer stands in its place; fetch the file itself by `git lfs pull` in its repository",
    ),
    # A file system without links, and Git where it is told to make none, has a link's target as a file's text.
    (re.compile(rb"((\.\./)*\.git)?/annex/objects/"), ANNEXED),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|\?xml)[\s>]", re.IGNORECASE),
        "a web page stands in its place; download the file itself, whose address on the hub has /resolve/ where its "
        "page's has /blob/, and which may need a login",
    ),
)


def stand_in(start: bytes) -> str | None:
    """Return what a file is instead of itself, and what to do about that; None if it may be the file.

    Args:
        start: the file's first `BEGINNING` bytes.
    """
    return next((what for pattern, what in STAND_INS if pattern.match(start)), None)


def refuse_stand_in(name: str, start: bytes, source: str) -> None:
    """Raise InvalidCheckpoint where a file begins as a pointer or a web page does."""
    what = stand_in(start)
    if what is not None:
        raise not_there(name, what, source)


def not_there(name: str, what: str, source: str) -> InvalidCheckpoint:
    return InvalidCheckpoint(source, f"{name} is not there: {what}", file=name)
