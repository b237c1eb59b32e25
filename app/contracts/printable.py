"""Texts from elsewhere, as a terminal may show them."""


def printable(text: str) -> str:
    """Return a text on one line, with escapes in place of what would be a command to a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
