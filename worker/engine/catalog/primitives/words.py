"""Says what is wrong with a field in words that follow its name, for everybody who shows errors of validation."""

import json
import re
from collections.abc import Mapping
from typing import Any

OF_THE_LIBRARY = [
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^URL scheme should ", "has a scheme that must "),
        (r"^\w+ (input )?should ", "must "),
        (r"^Input tag ('.*') found using .* does not match any of the expected tags: ", r"\1 is none of "),
        (r"^Unable to extract tag using discriminator '(\w+)'", r"must have \1"),
        (r"^must be (a valid integer|a valid int)\b.*", "must be a whole number"),
        (r"^must be a valid number\b.*", "must be a number"),
        (r"^must be a valid boolean\b.*", "must be true or false"),
        (r"^must be a valid string\b.*", "must be a text"),
        (r"^must be a valid (list|tuple|array|set)\b.*", "must be a list"),
        (r"^must be a valid dictionary\b.*", "must be an object"),
        (r"^must be None$", "must be null"),
        (r"^must be a valid URL, relative.*", "must be a whole URL, as https://host/path"),
        (r"^must be a valid URL, ", "must be a URL: "),
        (r" after validation(?=, not \d+$)", ""),
    )
]  # fmt: skip
"""The validation library's words, and ours in their place, one after the other."""
LONGEST_QUOTED = 40


def message_of(error: Mapping[str, Any]) -> str:
    """Return what is wrong with a field, in words that follow its name, and with a value that is short.

    Args:
        error: one of a ValidationError's errors. Without its `input`, which may be a secret, no value is quoted.
    """
    if error["type"] == "missing":
        return "is missing; give it"
    message = said = str(error["msg"]).removeprefix("Value error, ")
    for theirs, ours in OF_THE_LIBRARY:
        said = theirs.sub(ours, said, count=1)
    value = error.get("input", ...)
    is_address = error["type"].startswith("url")  # which may have a password
    is_quoted = said != message and not is_address and isinstance(value, str | int | float | None)
    quoted = json.dumps(value, ensure_ascii=False) if is_quoted else ""
    return f"{said}, not {quoted}" if 0 < len(quoted) <= LONGEST_QUOTED else said
