"""What became of a further place that a merge was to be published at."""

from typing import Literal

from pydantic import Field

from worker.engine.catalog.primitives.paths import Told
from worker.engine.catalog.primitives.strict import Strict

PublicationOutcome = Literal["published", "unchanged", "withheld", "failed"]


class PublicationError(Strict):
    code: Literal["denied", "refused", "unavailable", "timeout", "internal"]
    """`denied`: the service's token may not write there. `refused`: the place does not take it. `unavailable`: it does
    not answer. `timeout`: publishing took longer than `MASKMERGE_PUBLISH_SECONDS`. `internal`: a fault of the
    service."""
    message: Told
    """What went wrong, and what to do."""
    retryable: bool
    """Whether it may succeed without a change."""


class Publication(Strict):
    target: str
    """The place, as the request names it."""
    outcome: PublicationOutcome
    """`published`: it has the merge. `unchanged`: an earlier attempt had published the same files, and nothing was
    added. `withheld`: the merge does not reach what the request asks for. `failed`: `error` says why."""
    versions: dict[str, str] = Field(default_factory=dict)
    """The commit of the repository, or the version of each registered model, by its name."""
    url: str | None = None
    """Page of the result, for people."""
    error: PublicationError | None = None
    """Present when it failed."""
