"""The statistics that are kept, as the API lists them."""

from pydantic import AwareDatetime, BaseModel, ConfigDict

from worker.engine.catalog.contracts.statistics import KeptName


class ScoresEntry(BaseModel):
    """One statistic of one model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    digest: str
    """Digest of everything that the statistic follows from."""
    statistic: KeptName
    """Kind of the statistic."""
    checkpoint: str
    """Digest of the checkpoint."""
    source: str
    """Reference by which the checkpoint was named when it was first measured."""
    dataset: str
    """Reference of the rows that it was first measured on."""
    examples: int
    """Number of rows that were measured."""
    estimator: str | None
    """Estimator of scores; null for other statistics."""
    precision: str
    """Number format of forward and backward passes."""
    seed: int | None
    """Seed of the estimator `sampled`; null if no seed counts."""
    paper: bool
    """Whether it was computed by the published rule."""
    population: int | None
    """Number of rows of the data set, which standard errors depend on; null where there are no standard errors."""
    max_length: int
    """Number of tokens that a row was cut to."""
    batch_tokens: int | None
    """Number of padded tokens that were computed together; null where the statistic does not depend on it."""
    bytes: int
    """Size of its files."""
    created_at: AwareDatetime
    """Time at which it was measured."""
    used_at: AwareDatetime
    """Time at which a job last used it. The statistics that were used longest ago make room for others."""
    href: str
    """Path at which it is downloaded."""


class ScoresPage(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    data: list[ScoresEntry]
    """The statistics of this page, newest first."""
    next: str | None
    """Cursor of the next page, for `after`; null on the last."""
