"""The plan of a merge, as the API tells it."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class PlannedModel(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """The model's name in the request."""
    architecture: str
    """Class of the model in transformers."""
    task: str
    """Kind of its head."""
    head: str
    """Treatment of the model's head in the result."""
    tokens: int | None
    """Number of the output's tokens that the model has, if `output.vocabulary` is not `error`."""
    new_tokens: int | None
    """Number of these that `union` appends for it, because the base and the models before it lack them."""


class Plan(BaseModel):
    """The answer of `POST /merge/validate`, which tells what the job would do."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    bytes_to_read: int
    """Size of the checkpoints."""
    bytes_to_write: int
    """Size of the artifact's weights."""
    peak_memory_bytes: int
    """Estimate for one worker, in float32, with the longest rows that the models take."""
    least_memory_bytes: int
    """The same for a worker that has less. It holds models in the format of their files, or reads them layer by layer,
    if the method allows it; one with less than this refuses the job."""
    examples: int
    """Largest number of rows that would be measured, over all models."""
    aligned_examples: int
    """Largest number of rows that heads would be aligned on, over all models. Expert and merge each read them once."""
    candidates: list[str] | None
    """Names of the methods that `auto` would try."""
    trials: int | None
    """Number of merges that `auto` would try."""
    tensors: int
    """Number of tensors that are written."""
    owners: dict[str, int]
    """Number of merged tensors that belong to each kind of node, and to no node (rest)."""
    models: list[PlannedModel]
    """What is known of each model before the work."""
    tokens: int | None
    """Number of tokens of the output's tokenizer, if `output.vocabulary` is not `error`."""
    notes: list[str]
    """Notes with which the result will begin: what is left out, assumed, or merged in another way."""
    request: dict[str, Any]
    """The request as it would be accepted, with defaults filled in."""
    waiting_for: str | None = None
    """What a job would wait for: a live worker, or one with the `device` that it asks for. Null where there is one."""
