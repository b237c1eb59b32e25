"""Draws pictures as SVG, from numbers alone.

The plot is the SVG's own box: positions across are in per cent and stretch with the page, heights are in pixels, and
labels lie in margins beside the box. So text has one size on every screen, without scripts.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from worker.engine.catalog.drawing.colours import LEVELS, LINES
from worker.engine.catalog.drawing.html import Content, element

SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # circle
    "M-4 -4h8v8h-8z",  # square
    "M0 -5.2L5.2 4.2H-5.2z",  # triangle
    "M0 -5.6L5.6 0L0 5.6L-5.6 0z",  # diamond
    "M0 5.2L5.2 -4.2H-5.2z",  # triangle, down
    "M-1.8 -5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z",  # plus
)
TEXT_DROP = 4  # pixels from the middle of a line of text down to its baseline
LABEL_PX = 7.0  # width of a letter, for making room
BOLD_PX = 8.0  # the same of the values of strong lines
ROW = 24
LINE_HEIGHT = 170
AXIS = 22  # pixels below a plot


@dataclass(frozen=True)
class Scale:
    """Maps numbers to per cent of the plot's width, or to pixels of its height."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        if self.is_log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(value)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

    def across(self, value: float) -> str:
        return percent(self.share(value))

    def down(self, value: float, height: float = LINE_HEIGHT) -> float:
        return round(height * (1 - self.share(value)), 2)

    @property
    def ticks(self) -> list[float]:
        """Return about four round numbers within the scale; on a logarithmic axis powers of ten."""
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        step = _step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]

    @classmethod
    def around(cls, values: Sequence[float], *, least: float = 0.0) -> "Scale":
        """Make a scale with round ends around all values, at least `least` wide."""
        low, high = min(values), max(values)
        if high - low < least:
            low, high = (low + high - least) / 2, (low + high + least) / 2
        step = _step((high - low) / 4) if high > low else 1.0
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, max(last, first + 1) * step)


def _step(width: float) -> float:
    """Return the next of 1, 2, 5, 10 and so on."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * 0.999)


def percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def short(value: float) -> str:
    """Format a tick's number."""
    return f"{value:.6g}"


def picture(
    key: str, title: str, description: str, height: float, *content: Content, left: float = 0, right: float = 0
) -> Markup:
    """Make an image with a title and a description. `key` is unique on the page."""
    return element(
        "svg",
        element("title", title, id=f"{key}-t"),
        element("desc", description, id=f"{key}-d"),
        content,
        role="img",
        aria_labelledby=f"{key}-t",
        aria_describedby=f"{key}-d",
        height=height,
        style=f"width:calc(100% - {left + right:g}px);margin-left:{left:g}px",
    )


def text(words: str, x: str | float, y: float, anchor: str = "start", kind: str | None = None, dx: float = 0) -> Markup:
    return element(
        "text", words, x=x, y=y, dx=dx or None, text_anchor=None if anchor == "start" else anchor, class_=kind
    )


def line(x1: str, y1: float, x2: str, y2: float, kind: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def marker(index: int, x: str, y: float, *, hollow: bool = False) -> Markup:
    """Draw the shape and colour of series `index`; there are thirty-six pairs of them."""
    kind = f"{'hollow' if hollow else 'mark'} l{index % LINES + 1}"
    shape = SHAPES[(index + index // LINES) % len(SHAPES)]
    return element("svg", element("path", d=shape, class_=kind), x=x, y=y, role="none")


def key(entries: Sequence[tuple[int, str]], *, hollow: str | None = None) -> Markup:
    """Explain the marks of the series."""

    def entry(mark: Markup, words: str) -> Markup:
        sample = element("svg", mark, width=12, height=12, aria_hidden="true")
        return element("li", sample, element("span", words))

    found = [entry(marker(index, "6", 6), words) for index, words in entries]
    if hollow:
        found.append(entry(marker(0, "6", 6, hollow=True), hollow))
    return element("ul", found, class_="key")


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    written: str
    interval: tuple[float, float] | None = None
    strong: bool = False


def bars(
    name: str, title: str, description: str, rows: Sequence[Bar], *, low: float = 0.0, high: float = 1.0
) -> Markup:
    """Draw horizontal bars from 0, with intervals; each line has a label and a value."""
    scale = Scale(low, high)
    left = 8 + LABEL_PX * max(len(row.label) for row in rows)
    right = 10 + max((BOLD_PX if row.strong else LABEL_PX) * len(row.written) for row in rows)
    height = ROW * len(rows)
    drawn: list[Markup] = [line(scale.across(0), 0, scale.across(0), height, "rule")]
    for index, row in enumerate(rows):
        middle = ROW * index + ROW / 2
        start, end = sorted((scale.share(0), scale.share(row.value)))
        drawn.append(
            element(
                "rect",
                x=percent(start),
                y=middle - 6,
                width=percent(end - start),
                height=12,
                class_="bar strong" if row.strong else "bar",
            )
        )
        if row.interval:
            first, last = (scale.across(end) for end in row.interval)
            drawn.append(line(first, middle, last, middle, "whisker"))
            drawn += [line(at, middle - 3, at, middle + 3, "whisker") for at in (first, last)]
        drawn.append(text(row.label, 0, middle + TEXT_DROP, "end", "plain" if row.strong else None, dx=-8))
        drawn.append(text(row.written, "100%", middle + TEXT_DROP, "start", "value" if row.strong else "plain", dx=8))
    return picture(name, title, description, height, drawn, left=left, right=right)


@dataclass(frozen=True)
class Series:
    """One series of a plot. `index` gives its shape and colour, see `marker`."""

    index: int
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = ()
    """Least and largest value at each point."""
    is_joined: bool = True
    hollow: frozenset[int] = frozenset()
    """Indices of the points that are drawn hollow."""


@dataclass(frozen=True)
class Plot:
    """A plot of series over a horizontal axis."""

    x: Scale
    y: Scale
    series: Sequence[Series]
    x_label: str
    x_ticks: Sequence[tuple[float, str]] = ()
    """Places of ticks, each with its text; by default round numbers."""
    limits: Sequence[tuple[float, str]] = ()
    """Horizontal lines with their names."""
    steps: Sequence[tuple[float, float]] = ()
    """Points of a line that stays level until the next point."""
    letters: Sequence[tuple[float, float, str]] = ()
    """Places of small words above points, each with its text."""
    rings: Sequence[tuple[float, float]] = ()
    """Points that are marked with a ring."""
    height: float = LINE_HEIGHT


def plot(name: str, title: str, description: str, of: Plot) -> Markup:
    drawn: list[Markup] = []
    labels = [short(round(tick, 12)) for tick in of.y.ticks]
    for tick, label in zip(of.y.ticks, labels, strict=True):
        y = of.y.down(tick, of.height)
        drawn += [line("0%", y, "100%", y, "rule"), text(label, 0, y + TEXT_DROP, "end", dx=-8)]
    ticks = of.x_ticks or [(tick, short(round(tick, 12))) for tick in of.x.ticks]
    for value, words in ticks:
        share = of.x.share(value)
        anchor = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
        drawn.append(text(words, percent(share), of.height + 16, anchor))
    drawn.append(text(of.x_label, "50%", of.height + 33, "middle"))
    for value, words in of.limits:
        y = of.y.down(value, of.height)
        drawn += [line("0%", y, "100%", y, "limit"), text(words, "100%", y - 5, "end", "limit-text")]
    for (x, y), (x2, y2) in zip(of.steps, of.steps[1:], strict=False):
        at, level = of.x.across(x2), of.y.down(y, of.height)
        drawn.append(line(of.x.across(x), level, at, level, "best"))
        if y2 != y:
            drawn.append(line(at, level, at, of.y.down(y2, of.height), "best"))
    for series in of.series:
        drawn += _series(series, of)
    for x, y in of.rings:
        ring = element("circle", cx=of.x.across(x), cy=of.y.down(y, of.height), r=9, class_="ring")
        drawn.append(ring)
    for x, y, words in of.letters:
        above = 13 if (x, y) in of.rings else 9
        drawn.append(text(words, of.x.across(x), of.y.down(y, of.height) - above, "middle", "letter"))
    left = 12 + LABEL_PX * max(map(len, labels), default=0)
    return picture(name, title, description, of.height + AXIS + 18, drawn, left=left, right=8)


def _series(series: Series, of: Plot) -> list[Markup]:
    kind = f"l{series.index % LINES + 1}"
    places = [(of.x.across(x), of.y.down(y, of.height)) for x, y in series.points]
    drawn = []
    for (x, _), (least, most) in zip(places, series.spans, strict=False):
        if most > least:
            drawn.append(line(x, of.y.down(least, of.height), x, of.y.down(most, of.height), f"band {kind}"))
    if series.is_joined:
        for (x, y), (x2, y2) in itertools.pairwise(places):
            drawn.append(line(x, y, x2, y2, f"curve {kind}"))
    drawn += [marker(series.index, x, y, hollow=i in series.hollow) for i, (x, y) in enumerate(places)]
    return drawn


@dataclass(frozen=True)
class DotRow:
    label: str
    dots: Sequence[tuple[int, float]]
    """Pairs of series and value."""
    mean: float | None
    spread: tuple[float, float] | None
    strong: bool = False


def dots(
    name: str, title: str, description: str, rows: Sequence[DotRow], scale: Scale, limits: Iterable[float]
) -> Markup:
    """Draw a row of dots for each label, their mean as a bar across, and vertical limits."""
    row_height = 44
    height = row_height * len(rows)
    drawn: list[Markup] = []
    for tick in scale.ticks:
        at = scale.across(tick)
        drawn += [line(at, 0, at, height, "rule"), text(short(round(tick, 12)), at, height + 16, "middle")]
    for value in limits:
        at = scale.across(value)
        drawn.append(line(at, 0, at, height, "limit"))
    for index, row in enumerate(rows):
        top = row_height * index
        middle = top + 29
        drawn.append(text(row.label, 0, top + 13, kind="value" if row.strong else "plain"))
        drawn.append(line("0%", middle, "100%", middle, "faint"))
        if row.spread:
            drawn.append(line(scale.across(row.spread[0]), middle, scale.across(row.spread[1]), middle, "best"))
        if row.mean is not None:
            at = scale.across(row.mean)
            drawn.append(line(at, middle - 10, at, middle + 10, "whisker"))
        drawn += [marker(series, scale.across(value), middle) for series, value in row.dots]
    return picture(name, title, description, height + AXIS, drawn, left=8, right=8)


def heat(
    name: str,
    title: str,
    description: str,
    levels: Sequence[Sequence[int | None]],
    *,
    ramp: str,
    rows: int,
    columns: int,
) -> Markup:
    """Draw the cells of a map by level, 0 to 8; the first row is on top.

    Args:
        ramp: `a` for colours from little to much, `b` for colours around a middle.
        rows, columns: numbers of layers and nodes that the map's rows and columns stand for.
    """
    height = min(260, max(96, 14 * len(levels)))
    left = 14 + LABEL_PX * len(str(rows - 1))
    every = math.ceil(rows / max(2, height // 28))
    drawn = [
        text(str(layer), 0, (layer + 0.5) * height / rows + TEXT_DROP, "end", dx=-7) for layer in range(0, rows, every)
    ]
    drawn.append(
        element(
            "svg",
            cells(levels, ramp),
            width="100%",
            height=height,
            viewBox=f"0 0 {max(map(len, levels))} {len(levels)}",
            preserveAspectRatio="none",
            class_="cells",
            role="none",
        )
    )
    drawn += [text("0", "0%", height + 15), text(str(columns - 1), "100%", height + 15, "end")]
    return picture(name, title, description, height + AXIS, drawn, left=left)


def cells(levels: Sequence[Sequence[int | None]], ramp: str) -> list[Markup]:
    """Make one path for each level; neighbours in a row are one rectangle."""
    paths: dict[int, list[str]] = {}
    for row, cells in enumerate(levels):
        start = 0
        for column in range(1, len(cells) + 1):
            if column == len(cells) or cells[column] != cells[start]:
                level, width = cells[start], column - start
                if level is not None:
                    paths.setdefault(level, []).append(f"M{start} {row}h{width}v1h-{width}z")
                start = column
    return [element("path", d="".join(d), class_=f"{ramp}{level}") for level, d in sorted(paths.items())]


def ramp(kind: str, low: str, high: str, middle: str | None = None) -> Markup:
    """Explain the colours of a map."""
    swatches = [element("rect", x=18 * i, y=0, width=18, height=12, class_=f"{kind}{i}") for i in range(LEVELS)]
    drawn = element("svg", swatches, width=18 * LEVELS, height=12, aria_hidden="true", class_="cells")
    said = [element("span", low), drawn, element("span", high)]
    return element("div", said, element("span", f"({middle})") if middle else None, class_="ramp")
