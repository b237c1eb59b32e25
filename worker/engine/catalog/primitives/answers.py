"""Patterns that find an answer in a text, matched in linear time by RE2, which never goes back."""

from typing import Annotated, Any

import re2
from pydantic import AfterValidator, Field

PATTERN_BYTES = 1 << 20  # memory that a pattern may take; one that says "a thousand times a thousand" would take more


def answer_pattern(text: str) -> Any:
    """Compile a pattern in RE2's syntax. Raises ValueError where it has none, or is too large."""
    options = re2.Options()
    options.max_mem = PATTERN_BYTES
    options.log_errors = False  # RE2 would write them to the standard error
    try:
        return re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error.args[0]
        raise ValueError(f"it is no pattern of RE2 that is small enough: {reason}") from error


def answer_in(text: str, pattern: Any | None) -> str | None:
    """Return the pattern's first match, or that of its first group if it has one; None if there is none.

    Without a pattern the whole text is the answer. White space around an answer is no part of it.
    """
    if pattern is None:
        return text.strip()
    found = pattern.search(text)
    if found is None:
        return None
    answer: str | None = found.group(1 if pattern.groups else 0)
    return None if answer is None else answer.strip()


def _compiles(text: str) -> str:
    answer_pattern(text)
    return text


AnswerPattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_compiles)]
