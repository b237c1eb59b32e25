"""A recipe's settings of tokens."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from worker.engine.catalog.primitives.strict import Strict


class TokenSource(Strict):
    """The row of one token of the output."""

    source: Literal["own", "model", "base", "zero"] = "own"
    """Origin of the row: each model's own, one model's, the base's, or zeros. Any but the first counts for models that
    lack the token, and with `force` for all models."""
    model: Annotated[str, Field(max_length=64)] | None = None
    """Name of the model."""
    token: Annotated[str, Field(max_length=1000)] | None = None
    """Token whose row is taken in that model; null: the token itself."""
    id: Annotated[int, Field(ge=0)] | None = None
    """Number of the row in that model, instead of a token."""
    force: bool = False
    """Whether models that have the token get this row too."""

    @model_validator(mode="after")
    def _is_one_row(self) -> Self:
        if (self.source == "model") != (self.model is not None):
            raise ValueError("give model with the source model, and with no other")
        if self.source in ("own", "zero") and (self.token is not None or self.id is not None):
            raise ValueError("token and id are of a row of a model or of the base")
        if self.source == "own" and self.force:
            raise ValueError("each model has its own row anyway; give force with another source")
        if self.token is not None and self.id is not None:
            raise ValueError("give either token or id")
        return self


class TokenSettings(Strict):
    """A recipe's settings of the output's tokens, if vocabularies are merged."""

    vocabulary_of: Annotated[str, Field(max_length=64)] | None = None
    """Name of the model whose vocabulary `base` keeps, and whose tokenizer is published; null: the base's, or the first
    model's where no base is named."""
    tokens: Annotated[dict[str, TokenSource], Field(max_length=10_000)] | None = None
    """Rows of single tokens. A token that the vocabulary lacks is added to it."""
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """The number of rows of embedding matrices is a multiple of this; added rows are the mean of all others."""
