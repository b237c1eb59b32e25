"""Reads JSON files of checkpoints, within limits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from worker.engine.catalog.checkpoints.limits import MAX_CONFIG_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_KEY, MAX_KEYS
from worker.engine.catalog.checkpoints.reading import reads
from worker.engine.catalog.primitives.errors import InvalidCheckpoint


def read_file(file: Path, source: str, limit: int) -> bytes:
    """Read a file of at most `limit` bytes. Raises InvalidCheckpoint where it is larger, missing or not readable."""
    reads(source, file.name)
    try:
        if file.stat().st_size > limit:
            raise InvalidCheckpoint(source, f"{file.name} is larger than {limit} bytes")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InvalidCheckpoint(source, f"{file.name} is missing") from error
    except OSError as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read: {error.strerror}") from error


def parsed_json(raw: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON as UTF-8 without a byte order mark, as the libraries that load checkpoints do.

    Args:
        object_pairs_hook: as in `json.loads`.

    Raises:
        ValueError: it is no JSON, has nesting or numbers beyond anything real, or has half a surrogate pair, which no
            file could hold as UTF-8.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    content = json.loads(text, parse_int=_integer, object_pairs_hook=object_pairs_hook)
    for depth, _ in enumerate(_levels(content)):
        if depth == MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if b"\\u" in raw:  # only an escape can spell half a pair
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a surrogate pair, which is no character") from error
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; {MAX_DIGITS} are allowed")
    return int(digits)


def _levels(content: Any) -> Iterator[list[Any]]:
    """Yield the objects and lists of a JSON value level by level, the outermost first."""
    level = [content] if isinstance(content, dict | list) else []
    while level:
        yield level
        inner = (value.values() if type(value) is dict else value for value in level)
        level = [value for values in inner for value in values if type(value) is dict or type(value) is list]


def _check_keys(content: Any) -> None:
    """Raise ValueError for more or longer keys than configurations have: each is compared and may be quoted."""
    count = 0
    for level in _levels(content):
        objects = [value for value in level if isinstance(value, dict)]
        count += sum(map(len, objects))
        if count > MAX_KEYS:
            raise ValueError(f"its objects have more than {MAX_KEYS} keys")
        longest = max((key for value in objects for key in value), key=len, default="")
        if len(longest) > MAX_KEY:
            raise ValueError(f"the key '{longest[:40]}…' has {len(longest)} characters; {MAX_KEY} are allowed")


def read_json(file: Path, source: str, limit: int) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidCheckpoint when it is missing, larger than `limit` bytes or no JSON object."""
    try:
        content = parsed_json(read_file(file, source, limit))
        if limit <= MAX_CONFIG_BYTES:  # vocabularies and indices have keys of their own
            _check_keys(content)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(source, f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(source, f"{file.name} is not a JSON object")
    return content
