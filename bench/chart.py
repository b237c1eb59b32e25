"""Draws the ratios that a bench found, as a picture for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure

MOST_ROWS = 40
LONGEST_LABEL = 80
SPREAD = 8.0
"""Ratio of the longest to the shortest bar beyond which the axis is logarithmic."""
TEXT, MET, MISSED = "#7f7f7f", "#3d9a63", "#c8682c"  # readable on white and on black
SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "maskmerge",  # the same rows give the same bytes
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
}


def chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG with a bar for each row that has a ratio, and a line at 1, the reference itself.

    Bars of rows that miss their target have another colour. The text is empty where there is no ratio, or where there
    are too many to read.
    """
    bars = [row for row in rows if isinstance(row["ratio"], int | float) and row["ratio"] > 0]
    if not bars or len(bars) > MOST_ROWS:
        return ""
    labels = [str(row["what"]) for row in bars]
    ratios = [float(row["ratio"]) for row in bars]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 0.6 + 0.24 * len(bars)), layout="constrained")
        axes = figure.subplots()
        places = range(len(bars))
        drawn = axes.barh(places, ratios, color=[MET if row["met"] else MISSED for row in bars])
        axes.bar_label(drawn, [f"{ratio:.3g}" for ratio in ratios], padding=3)
        shortened = (label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…" for label in labels)
        axes.set_yticks(places, list(shortened), parse_math=False)
        axes.invert_yaxis()
        axes.axvline(1, color=TEXT, linewidth=0.8)
        if max(*ratios, 1.0) > SPREAD * min(*ratios, 1.0):
            axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("ratio to the reference")
        written = StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()
