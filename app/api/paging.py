"""Cuts lists into pages."""

import re
from typing import Annotated, Any

from fastapi import Query
from pydantic import BeforeValidator, Field


def _digits(text: Any) -> Any:
    """Accept digits alone; Python's `int` also reads signs, spaces, underscores and digits of other scripts."""
    if isinstance(text, str) and not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError("write a whole number, in digits")
    return text


Limit = Annotated[
    int, Field(ge=1, le=100), BeforeValidator(_digits), Query(description="Most entries of the page, in digits")
]
