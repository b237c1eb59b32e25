"""What a tenant may take of the service."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import ConfigDict, Field

from worker.engine.catalog.primitives.strict import Strict

MAX_BODY_BYTES = 1_000_000
HIGHEST_PRIORITY = 10
LOWEST_PRIORITY = -10


class Limits(Strict):
    """Limits of one tenant; None is no limit."""

    model_config = ConfigDict(use_attribute_docstrings=True, frozen=True)

    active_jobs: Annotated[int, Field(ge=1)] | None = None
    """Number of jobs that run at once; others of the tenant wait."""
    queued_jobs: Annotated[int, Field(ge=1)] | None = None
    """Number of jobs that wait."""
    stored_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of artifacts, with those that waiting and running jobs are going to write."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Number of requests in a minute."""
    body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """Bytes of a request's body."""
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = HIGHEST_PRIORITY
    """Highest priority that a request may ask for."""


@dataclass(frozen=True)
class TenantLimits:
    """The limits of every tenant."""

    default: Limits = field(default_factory=Limits)
    tenants: Mapping[str, Limits] = field(default_factory=dict)
    """Limits of tenants that have their own."""

    def of(self, tenant: str) -> Limits:
        return self.tenants.get(tenant, self.default)


UNLIMITED = TenantLimits()
