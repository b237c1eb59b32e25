"""The page's colours, in both schemes. Tests hold their contrasts: text 4.5 to 1, lines and marks of pictures 3 to 1.

Hues stay apart for colour-blind readers; whatever colours tell apart, shapes and words tell apart too.
"""

TEXT = ("text", "muted", "link")
MARKS = ("strong", "quiet", "line1", "line2", "line3", "line4", "line5", "line6", "limit")
GROUNDS = ("page", "panel")

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "rule": "#d9dde3",
    "text": "#1a1f26",
    "muted": "#57606b",
    "link": "#0a5599",
    "strong": "#0b5fad",
    "quiet": "#7d8794",
    "limit": "#b3261e",
    "line1": "#0b5fad",
    "line2": "#b8500a",
    "line3": "#0b7a5b",
    "line4": "#8a3ea8",
    "line5": "#4d5560",
    "line6": "#8a6a00",
}
DARK = {
    "page": "#0f1318",
    "panel": "#171c23",
    "rule": "#323a44",
    "text": "#e7eaee",
    "muted": "#a2acb8",
    "link": "#85bdff",
    "strong": "#62aef7",
    "quiet": "#828d9a",
    "limit": "#ff8b80",
    "line1": "#62aef7",
    "line2": "#f09a55",
    "line3": "#45c49b",
    "line4": "#cf93e6",
    "line5": "#b6bec8",
    "line6": "#dcb73c",
}

LINES = 6  # number of colours of series
LEVELS = 9  # number of colours of a map

# Colours from little to much go from light to dark where the page is light, so that large values stand out in both.
AMOUNT_LIGHT = ("#eef2f7", "#dae6f2", "#bfd6ea", "#9dc1de", "#74a8d0", "#4d8cc0", "#2b70ac", "#12548f", "#08386a")
AMOUNT_DARK = ("#1a212a", "#1d2d3e", "#203b55", "#244c70", "#2a5f8d", "#3a78ac", "#5794c8", "#84b4de", "#bcd8f2")
# Colours from less than a share to more, with the share itself in the middle.
BALANCE_LIGHT = ("#8a3c04", "#bb5f12", "#e0944b", "#f3cda2", "#eef0f2", "#b7d2ea", "#70a6d6", "#2f75b3", "#0a4480")
BALANCE_DARK = ("#ffbd7a", "#dd8a35", "#a8621d", "#5f3d1c", "#262d35", "#1f4566", "#2c6ba6", "#559bd6", "#a9d2ff")


def variables(scheme: dict[str, str], amount: tuple[str, ...], balance: tuple[str, ...]) -> str:
    """Write colours as custom properties of CSS."""
    named = {**scheme, **{f"a{i}": c for i, c in enumerate(amount)}, **{f"b{i}": c for i, c in enumerate(balance)}}
    return " ".join(f"--{name}: {colour};" for name, colour in named.items())
