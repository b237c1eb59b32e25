"""What every bench prints, and writes as JSON: each measurement beside what it is measured against."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    what: str
    ours: float
    reference: float
    ratio: float
    target: str
    met: bool


def show(rows: Sequence[Row], path: Path | None) -> None:
    """Print the rows as a table, and write them to `path`."""
    table = Table(title="Targets", title_justify="left")
    for column in Row._fields:
        table.add_column(column, justify="left" if column in ("what", "target") else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
