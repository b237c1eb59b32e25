"""A pydantic model that refuses what it does not know, and says what was probably meant."""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

LONGEST_NAME = 40  # of what is quoted: columns of a file without a header are its first row
MOST_NAMES = 20


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the list of them."""
    shown = [one if len(one) <= LONGEST_NAME else f"{one[:LONGEST_NAME]}…" for one in sorted(known)]
    near = get_close_matches(name[:LONGEST_NAME], shown, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return f"; known are {', '.join(shown[:MOST_NAMES])}{more}"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for name in data:
                if name not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_field",
                        "unknown field '{field}'{hint}",
                        {"field": str(name)[:LONGEST_NAME], "hint": did_you_mean(str(name), known)},
                    )
        return data
