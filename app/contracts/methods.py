"""Merge methods, as the API lists them."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ModelCount(BaseModel):
    """Number of models that a method merges."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    least: int
    """Smallest number."""
    most: int | None
    """Largest number; null if there is no limit."""


class MethodDescription(BaseModel):
    """A merge method."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """Name, as `method.name` takes it."""
    formula: str
    """The method in one line."""
    source: str
    """Paper or program in which it was published."""
    needs: list[str]
    """What a request must have besides checkpoints: `dataset`, `base`, `evaluation`."""
    models: ModelCount
    """How many models it merges."""
    per_model: list[str]
    """Parameters of which each model can have its own value."""
    search: dict[str, dict[str, Any]]
    """Values of each parameter that `auto` tries: a range, or a list."""
    parameters: dict[str, Any]
    """JSON Schema of the method's parameters, with defaults."""


class MethodList(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    data: list[MethodDescription]
    """All methods; `auto` comes last."""
