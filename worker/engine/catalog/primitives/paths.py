"""No message tells where on this machine anything lies: what libraries and the system say is stripped of it here.

What they say goes to whoever posted the job, who knows folders by references alone. Of an absolute path its last part
is left, which names the file. Errors, notes and answers pass through here where they are made, whoever worded them.
"""

import os
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

_END = r"""\s'"`<>|,;:()\[\]{}"""  # none of these is in a path that stands without quotes
_BEGIN = r"(?<![\w./~-])(?<!local:)"  # neither within a word, an address or a relative path, nor what a caller wrote
_hidden: set[str] = set()


def hide(*folders: Path) -> None:
    """Remember folders that no message may name, also when their names have spaces."""
    _hidden.update(str(path) for folder in folders for path in (folder.absolute(), folder.resolve()))
    _patterns.cache_clear()


def without_paths(text: str) -> str:
    """The text with absolute paths of this machine cut down to their last parts."""
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
    """In quotes, where a path may have spaces; below a folder that is known; below any folder at the root."""
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
    """An error's message in one line, with at most 300 characters and no paths of this machine."""
    return (without_paths(" ".join(str(error).split())) or type(error).__name__)[:300]
