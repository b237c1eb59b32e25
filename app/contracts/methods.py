"""Merge methods, as the API lists them."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ModelCount(BaseModel):
    """Number of models that a method merges."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    least: int
    most: int | None
    """Null if there is no limit."""


class MethodDescription(BaseModel):
    """A merge method."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    formula: str
    source: str
    needs: list[str]
    """What a request must have besides checkpoints: `dataset`, `base`, `evaluation`."""
    models: ModelCount
    per_model: list[str]
    """Parameters of which each model can have its own value."""
    search: dict[str, dict[str, Any]]
    """Values of each parameter that `auto` tries: a range, or a list."""
    parameters: dict[str, Any]
    """JSON Schema of the method's parameters, with defaults."""


class MethodList(BaseModel):
    data: list[MethodDescription]
