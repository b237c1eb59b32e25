"""Strips paths of this machine from messages, also from those of libraries and the system.

Messages go to the user who posted the job, who knows folders by references alone. The last part of an absolute path is
left, because it names the file. Errors, notes and answers pass through here when they are made, whoever worded them.
"""

import os
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

_END = r"""\s'"`<>|,;:()\[\]{}"""  # a path without quotes has none of these
_BEGIN = r"(?<![\w./~-])(?<!local:)"  # not within a word, an address, a relative path or a reference
_hidden: set[str] = set()


def hide(*folders: Path) -> None:
    """Remember folders that no message may name, also when their names have spaces."""
    _hidden.update(str(path) for folder in folders for path in (folder.absolute(), folder.resolve()))
    _patterns.cache_clear()


def without_paths(text: str) -> str:
    """Cut absolute paths of this machine in a text down to their last parts."""
    if "/" not in text:
        return text
    for pattern in _patterns():
        text = pattern.sub(_last_part, text)
    return text


def told(value: Any) -> Any:
    """Cut paths in all strings of a JSON value, except in keys."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {name: told(part) for name, part in value.items()}
    return [told(part) for part in value] if isinstance(value, list | tuple) else value


Told = Annotated[str, AfterValidator(without_paths)]
"""A text for the user who posted the job."""


def _last_part(found: re.Match[str]) -> str:
    return found["path"].rstrip("/").rpartition("/")[2]


@lru_cache(1)
def _patterns() -> list[re.Pattern[str]]:
    """Return patterns of paths: in quotes, which may have spaces; below a known folder; below any root folder."""
    usual = (tempfile.gettempdir(), sys.prefix, sys.base_prefix, str(Path.home()), str(Path(__file__).parents[4]))
    known = sorted({folder for folder in (*_hidden, *usual) if folder != "/"}, key=len, reverse=True)
    roots = sorted(entry.name for entry in os.scandir("/") if entry.is_dir())
    below_root = rf"/+(?:{'|'.join(map(re.escape, roots))})/"
    below_known = rf"(?:{'|'.join(map(re.escape, known))})(?![\w.-])"
    return [
        re.compile(rf"(?<=')(?:file://)?(?P<path>{below_root}[^'\n]*)(?=')"),
        re.compile(rf'(?<=")(?:file://)?(?P<path>{below_root}[^"\n]*)(?=")'),
        re.compile(rf"{_BEGIN}(?:file://)?(?P<path>{below_known}[^{_END}]*)"),
        re.compile(rf"{_BEGIN}(?<!:)(?:file://)?(?P<path>{below_root}[^{_END}]*)"),
    ]


def in_one_line(error: BaseException) -> str:
    """Return an error's message in one line, with at most 300 characters and no paths of this machine."""
    return (without_paths(" ".join(str(error).split())) or type(error).__name__)[:300]
