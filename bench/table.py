"""What every bench prints, and writes as JSON: each measurement beside what it is measured against."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("what", "ours", "reference", "ratio", "target", "met")

console = Console(width=150)


def shown(path: Path | None, found: list[dict[str, Any]]) -> None:
    """Print the rows as a table, and write them to `path`."""
    table = Table(title="Targets", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("what", "target") else "right")
    for row in found:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
