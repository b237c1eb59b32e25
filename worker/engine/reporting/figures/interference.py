"""Pictures of the interference between task vectors, by layer."""

import math
import statistics
from collections.abc import Sequence

from markupsafe import Markup

from worker.engine.catalog.drawing.charts import (
    Plot,
    Scale,
    Series,
    plot,
)
from worker.engine.catalog.drawing.html import details, element, table
from worker.engine.reporting.contents import InterferenceReport, LayerInterference, Spread
from worker.engine.reporting.words import (
    number,
)


def interference(found: InterferenceReport | None) -> list[Markup]:
    """Draw cosines and sign conflicts of task vectors by layer."""
    if found is None:
        return []
    share = "all values" if found.share_read == 1 else f"{100 * found.share_read:.3g} % of the values, evenly spread"
    pairs = (
        "the two models"
        if found.pairs_in_all == 1
        else f"{found.pairs_in_all} pairs of models, shaded from the least to the most"
    )
    about = (
        "Task vectors are what models changed in their base. Where they point the same way, their cosine is 1; values "
        "that two models changed in opposite directions are in conflict. "
        f"Computed from {share} of each model, for {pairs}."
    )
    layers = [layer for layer in found.layers if layer.layer is not None]
    cards = [
        _by_layer("cosine", "Cosine between task vectors", layers, [layer.cosine for layer in layers], 0),
        _by_layer("conflicts", "Share of sign conflicts", layers, [layer.sign_conflicts for layer in layers], 1),
    ]
    rows = [[layer.title, *_spread(layer.cosine), *_spread(layer.sign_conflicts)] for layer in found.layers]
    columns = ["layer", "mean cosine", "least", "most", "mean share of conflicts", "least", "most"]
    listed = [[" and ".join(p.models), number(p.cosine, 3), number(p.sign_conflicts, 3)] for p in found.pairs]
    caption = "Pairs over all layers"
    if found.pairs_in_all > len(found.pairs):
        caption += f": the first {len(found.pairs)} of {found.pairs_in_all}"
    return [
        element("p", about, class_="note"),
        element("div", [card for card in cards if card], class_="cards"),
        details("Table by layer", table(columns, rows, "Interference by layer", numeric=range(1, 7))),
        details("Table by pair", table(["models", "cosine", "share of conflicts"], listed, caption, numeric=(1, 2))),
    ]


def _spread(of: Spread | None) -> list[str]:
    return ["-"] * 3 if of is None else [f"{value:.3f}" for value in (of.mean, of.least, of.most)]


def _by_layer(
    name: str, title: str, layers: Sequence[LayerInterference], values: Sequence[Spread | None], index: int
) -> Markup | None:
    known = [(float(x), value) for x, value in enumerate(values) if value is not None]  # a decoder's after an encoder's
    if not known:
        return None
    ends = [end for _, value in known for end in (value.least, value.most)]
    series = Series(index, [(x, v.mean) for x, v in known], [(v.least, v.most) for _, v in known])
    mean = statistics.fmean(value.mean for _, value in known)
    said = f"By layer, on average {mean:.3f}; all pairs lie between {min(ends):.3f} and {max(ends):.3f}."
    last = known[-1][0]
    shown = range(0, int(last) + 1, max(1, math.ceil(last / 8)))
    ticks = [(float(x), layers[x].title) for x in shown]
    drawn = Plot(Scale(0, max(last, 1)), Scale.around([0.0, *ends]), [series], "layer", x_ticks=ticks)
    return element("div", element("h3", title), plot(f"interference-{name}", title, said, drawn), class_="card")
