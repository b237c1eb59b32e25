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
    """Number of jobs that run at once; others wait. Each shard of a job's scoring that runs counts as one."""
    queued_jobs: Annotated[int, Field(ge=1)] | None = None
    """Number of jobs that wait."""
    stored_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of artifacts and uploads, with those that waiting and running jobs are going to write."""
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


class OverLimit(Exception):
    """A tenant asks for more than it may have; see the subclasses. The message says the limit and the present use."""

    def __init__(self, message: str, limit: int, used: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used


class QueueFull(OverLimit):
    """The tenant has as many waiting jobs as it may have."""

    def __init__(self, limit: int, used: int) -> None:
        super().__init__(f"{used} of the tenant's jobs wait, and {limit} may", limit, used)


class StorageFull(OverLimit):
    """The tenant's artifacts and uploads would take more bytes than they may."""

    def __init__(self, limit: int, used: int, wanted: int) -> None:
        super().__init__(
            f"the tenant's artifacts and uploads take {used} bytes, with what its waiting and running jobs will write; "
            f"this would add {wanted}, and {limit} are allowed",
            limit,
            used,
        )


class NoRoom(Exception):
    """The data folder has too little room. The message says how much there is.

    Args:
        wanted: bytes that are asked for.
        reserved: bytes that waiting and running jobs are going to write.
        left: bytes that all of this may take.
    """

    def __init__(self, wanted: int, reserved: int, left: int) -> None:
        kept = f", since waiting and running jobs need {reserved} bytes" if reserved else ""
        super().__init__(f"this takes {wanted} bytes, and the data folder has room for {max(0, left - reserved)}{kept}")


UNLIMITED = TenantLimits()
