"""Picture of the time that each phase took."""

from collections.abc import Mapping

from markupsafe import Markup

from worker.engine.catalog.drawing.charts import (
    Bar,
    bars,
)
from worker.engine.catalog.drawing.html import details, table


def timings(spent: Mapping[str, float]) -> list[Markup]:
    """Draw bars of the seconds that each phase took."""
    if not spent:
        return []
    rows = [Bar(name, seconds, f"{seconds:.2f} s", strong=True) for name, seconds in spent.items()]
    said = "; ".join(f"{row.label} {row.written}" for row in rows)
    picture = bars("timings", "Seconds by phase", f"{said}.", rows, high=max(spent.values()))
    columns = [[name, f"{seconds:.2f}"] for name, seconds in spent.items()]
    return [
        picture,
        details("Table of seconds", table(["phase", "seconds"], columns, "Seconds by phase", numeric=(1,))),
    ]
