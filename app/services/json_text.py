"""Reads JSON from outside, as the RFC defines it, and refuses whatever readers understand in two ways."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from app.services.yaml_text import MOST_NODES

DEEPEST = 50  # levels; a recipe has ten
LONGEST_NUMBER = 100  # digits


class NotJson(ValueError):
    """The text is not acceptable JSON; the message says why and where."""


def parse_json(body: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        NotJson: it is not JSON or not UTF-8, repeats a key, has a number that is infinite, undefined or too long, is
            nested too deeply, or has too many values.
    """
    members = 0

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Count values, to stop early: collecting the garbage of very many objects takes longer than reading them."""
        nonlocal members
        found = _object(pairs)
        members += len(pairs)
        if members > MOST_NODES:
            raise NotJson(f"more than {MOST_NODES} values")
        return found

    try:
        value = json.loads(
            body.decode("utf-8-sig"),  # some editors begin files with a mark of the encoding
            object_pairs_hook=counted,
            parse_constant=_refused,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise NotJson(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg}, line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise NotJson(f"more than {DEEPEST} levels") from error
    _check_size(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise NotJson(f"the key '{twice[:40]}' is there twice")
    return found


def _refused(text: str) -> Any:
    raise NotJson(f"{text} is no number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotJson(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise NotJson(f"the number {text[:40]}… is too long")
    return int(text)


def _check_size(value: Any) -> None:
    level, count = [value], 1
    for _ in range(DEEPEST):
        count += sum(len(outer) for outer in level if isinstance(outer, dict | list))
        if count > MOST_NODES:
            raise NotJson(f"more than {MOST_NODES} values")
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
    if level:
        raise NotJson(f"more than {DEEPEST} levels")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
