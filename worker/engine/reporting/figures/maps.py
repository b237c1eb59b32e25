"""Maps of what is known of every mask node: scores and merge weights."""

import math
import statistics
from collections.abc import Sequence

from markupsafe import Markup

from worker.engine.catalog.drawing.charts import (
    heat,
    ramp,
)
from worker.engine.catalog.drawing.colours import LEVELS
from worker.engine.catalog.drawing.html import details, element, table
from worker.engine.reporting.contents import Known, Maps, NodeMap
from worker.engine.reporting.words import (
    listed,
)

REACH = 0.95  # share of merge weights that a map tells apart; others have its last colours
OCTAVES = 3.0  # a map of scores goes from 1/8 of the mean to 8 times
Grid = Sequence[Sequence[Known]]


def scores(maps: Maps | None) -> list[Markup]:
    """Draw a map of each kind of node for each model, relative to the model's mean."""
    if maps is None:
        return []
    about = (
        "The score of a mask node is how much the model's predictions depend on it, the Fisher information of a factor "
        "on it. Colours show it relative to the mean over the model's nodes of that kind."
    )
    parts = [element("p", about, class_="note"), *_left_out(maps)]
    parts.append(ramp("a", "1/8 of the mean", "8 times", "or further from it"))
    for index, name in enumerate(maps.models):
        drawn = []
        for of in _of(maps, name):
            grid = of.scores[name]
            mean = _mean(grid)
            levels = [[_octave(value, mean) for value in row] for row in grid]
            title = f"Scores of {name}: {of.title} by layer"
            said = f"Mean {mean:.3g}. The largest mean of a block is {max(_flat(grid)):.3g}{_where(of, grid)}."
            picture = heat(
                f"scores-{of.stack}{of.nodes}-{index}", title, said, levels, ramp="a", rows=of.layers, columns=of.count
            )
            drawn.append((f"{of.title}, mean {mean:.3g}", picture, _grid_table(of, grid, title)))
        parts.append(_of_model(name, drawn))
    return parts


def weights(maps: Maps | None) -> list[Markup]:
    """Draw such maps of merge weights, around the weight that each model has by its lambda."""
    if maps is None or not any(of.weights for of in maps.maps):
        return []
    apart = sorted(
        abs(value - (of.lambdas[name] or 0))
        for of in maps.maps
        for name, grid in of.weights.items()
        for value in _flat(grid)
    )
    reach = apart[int(len(apart) * REACH)]
    about = (
        "The merge weight that the slices of a head or neuron take from each model. The middle colour is the model's "
        "share by its weight alone, where scores say nothing."
    )
    parts = [element("p", about, class_="note"), *_left_out(maps, says_blocks=False)]
    parts.append(ramp("b", f"{reach:.2f} less", f"{reach:.2f} more", "than its share by weight, or further"))
    for index, name in enumerate(maps.models):
        drawn = []
        for of in _of(maps, name):
            grid, middle = of.weights[name], of.lambdas[name] or 0.0
            levels = [[_balance(value, middle, reach) for value in row] for row in grid]
            flat = _flat(grid)
            title = f"Merge weights of {name}: {of.title} by layer"
            said = f"From {min(flat):.3f} to {max(flat):.3f}, {middle:.3f} by the model's weight alone."
            picture = heat(
                f"weights-{of.stack}{of.nodes}-{index}", title, said, levels, ramp="b", rows=of.layers, columns=of.count
            )
            label = f"{of.title}, mean {_mean(grid):.3f}"
            drawn.append((label, picture, _grid_table(of, grid, title)))
        parts.append(_of_model(name, drawn))
    return parts


def _of_model(name: str, drawn: Sequence[tuple[str, Markup, Markup]]) -> Markup:
    pictures = [element("div", element("h4", label), picture) for label, picture, _ in drawn]
    tables = details("Tables", [of for _, _, of in drawn])
    return element("div", element("h3", name), element("div", pictures, class_="wide"), tables, class_="model")


def _of(maps: Maps, model: str) -> list[NodeMap]:
    return [of for of in maps.maps if model in of.scores]


def _left_out(maps: Maps, *, says_blocks: bool = True) -> list[Markup]:
    pooled: dict[str, None] = {}
    for of in maps.maps:
        grid = next(iter(of.scores.values()))
        if len(grid[0]) < of.count:
            pooled[f"{len(grid[0])} blocks of {of.count} {of.title}"] = None
        if len(grid) < of.layers:
            pooled[f"{len(grid)} runs of {of.layers} layers"] = None
    said = []
    if pooled and says_blocks:
        said.append(f"Maps show means over {listed(list(pooled))}; the folder scores has the scores of all nodes.")
    if maps.left_out:
        said.append(f"Shown are the first {len(maps.models)} of {len(maps.models) + maps.left_out} models.")
    return [element("p", " ".join(said), class_="note")] if said else []


def _flat(grid: Grid) -> list[float]:
    return [value for row in grid for value in row if value is not None]


def _mean(grid: Grid) -> float:
    return statistics.fmean(_flat(grid))


def _where(of: NodeMap, grid: Grid) -> str:
    largest = max(_flat(grid))
    row = next(index for index, cells in enumerate(grid) if largest in cells)
    return f", in layer {row * of.layers // len(grid)}"


def _octave(value: float | None, mean: float) -> int | None:
    if value is None:
        return None
    if value <= 0 or mean <= 0:
        return 0
    return _level((math.log2(value / mean) + OCTAVES) / (2 * OCTAVES))


def _balance(value: float | None, middle: float, reach: float) -> int | None:
    return None if value is None else _level(0.5 + (value - middle) / (2 * reach) if reach else 0.5)


def _level(share: float) -> int:
    return min(LEVELS - 1, max(0, math.floor(share * LEVELS)))


def _grid_table(of: NodeMap, grid: Grid, caption: str) -> Markup:
    """Make a table whose rows are layers and whose columns are nodes, or blocks of them, by their first."""
    width = max(map(len, grid))
    columns = ["layer", *(str(_first(index, of.count, width)) for index in range(width))]
    rows = [
        [str(_first(index, of.layers, len(grid))), *("-" if value is None else f"{value:.3g}" for value in cells)]
        for index, cells in enumerate(grid)
    ]
    return element("div", table(columns, rows, caption, numeric=range(1, width + 1)), class_="tiny")


def _first(index: int, of: int, parts: int) -> int:
    """Return the first entry of run `index`. If not all runs can be equally long, the first ones are one longer."""
    return index * (of // parts) + min(index, of % parts)
