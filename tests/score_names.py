"""Names of scores from their text, which the product never parses."""

from worker.engine.catalog.families import NODE_KINDS, ScoreName


def named(text: str) -> ScoreName:
    """Of `layers.0.heads`."""
    _, layer, kind = text.split(".")
    return ScoreName(int(layer), NODE_KINDS[kind])
