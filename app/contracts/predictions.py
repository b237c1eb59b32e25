"""Requests to try a merge on a few rows, and what API and workers tell each other of them."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.contracts.jobs import JobError
from worker.engine.catalog.contracts.prediction import MOST_NEW_TOKENS, NEW_TOKENS, Prediction
from worker.engine.catalog.primitives.strict import Strict

MOST_ROWS = 16
LONGEST_ROW = 10_000  # characters


def _checked(row: object) -> object:
    """Return a row that is a text or an object, and not too long. Messages quote nothing of it."""
    if not isinstance(row, str | dict):
        raise PydanticCustomError("row", "is neither a text nor an object of columns")
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    if len(text) > LONGEST_ROW:
        values = {"length": len(text), "most": LONGEST_ROW}
        raise PydanticCustomError("row", "has {length} characters, and {most} are allowed", values)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise PydanticCustomError("row", "is not Unicode text") from None
    return row


Row = Annotated[str | dict[str, Any], BeforeValidator(_checked)]


class PredictionRequest(Strict):
    """Rows that a merge, one of its experts and the plain average are to answer."""

    model: Annotated[str, Field(max_length=64)]
    """Name of a model of the job, whose head and labels count."""
    rows: Annotated[list[Row], Field(min_length=1, max_length=MOST_ROWS)]
    """Rows as texts, or as objects of columns: `text` and `text_pair`, `tokens` (words, or a text of words), or
    `messages`. A row has at most 10,000 characters, and as many tokens as the model reads."""
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = NEW_TOKENS
    """Largest number of tokens that a language model writes after a row."""


class PredictionOrder(BaseModel):
    """A request as a worker gets it."""

    job: str
    merged: str
    """Name of the model in the job's artifact."""
    request: PredictionRequest
    deadline_ms: int
    """Time after which nobody waits for the answer, in milliseconds since the epoch."""
    request_id: str | None


class PredictionOutcome(BaseModel):
    """A worker's answer: one of both."""

    prediction: Prediction | None = None
    error: JobError | None = None
