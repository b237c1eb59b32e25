"""Picture of the errors of merge weights, which fall as rows are measured."""

from markupsafe import Markup

from worker.engine.catalog.contracts.report import Stopping
from worker.engine.catalog.drawing.charts import (
    Plot,
    Scale,
    Series,
    plot,
)
from worker.engine.catalog.drawing.html import details, element, table

ABOUT_ERRORS = (
    "Standard errors of the merge weights: the root mean square over the nodes of a layer and kind, of the layer, kind "
    "and model where it is largest; the shade goes down to where it is smallest. Scores are heavy-tailed: errors from "
    "fewer than a few hundred rows are too small."
)


def certainty(stopping: Stopping | None, model: str | None = None, index: int = 0) -> list[Markup]:
    """Draw the error curve; with `model`, that of this model alone, the job's number `index`."""
    if stopping is None or not stopping.curve:
        return []
    curve = stopping.curve
    points = [(float(look.examples), look.error) for look in curve]
    spans = [(min(look.errors.values(), default=look.error), look.error) for look in curve]
    limits = [] if stopping.tolerance is None else [(stopping.tolerance, f"tolerance {stopping.tolerance:g}")]
    first, last = points[0][0], points[-1][0]
    x = Scale(first, last, is_log=True) if last > first else Scale(first - 1, first + 1)
    top = Scale.around([0.0, *(y for _, y in points), *(value for value, _ in limits)])
    said = f"After {curve[-1].examples} rows of each model the largest error is {curve[-1].error:.4f}."
    if stopping.reached is not None:
        said += " That is within the tolerance." if stopping.reached else " That is above the tolerance."
    ticks = [(value, f"{value:.0f}") for value, _ in points]
    title = "Largest error of the merge weights" + (f" with {model}" if model else "")
    drawn = Plot(x, top, [Series(0, points, spans)], "rows of each model", x_ticks=ticks, limits=limits)
    picture = plot(f"certainty-{index}", title, said, drawn)
    rows = [[str(look.examples), f"{look.error:.4f}"] for look in curve]
    caption = "Largest error by rows" + (f", {model}" if model else "")
    return [
        element("h3", model) if model else element("p", ABOUT_ERRORS, class_="note"),
        element("p", said),
        element("div", picture, class_="narrow"),
        details("Table", table(["rows of each model", "largest error"], rows, caption, numeric=(1,))),
    ]
