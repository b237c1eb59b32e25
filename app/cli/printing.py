"""What commands print: JSON for programs, tables for people."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel


def print_json(value: "BaseModel | dict[str, Any]") -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value) if isinstance(value, dict) else value.model_dump_json(), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns with two spaces between them."""
    lines = [tuple(columns), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """Return a text on one line, with escapes in place of what would be a command to a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"
