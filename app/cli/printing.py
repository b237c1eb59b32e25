"""What commands print: JSON for programs, tables for people."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from app.contracts.printable import printable

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


def minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}"
