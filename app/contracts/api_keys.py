"""API keys: who calls, for which tenant, and what the caller may do."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from worker.engine.catalog.primitives.strict import Strict

DEFAULT_TENANT = "default"
"""Tenant of callers without a key, and of jobs that were made before there were tenants."""
TENANT = r"^[a-z0-9][a-z0-9-]{0,31}$"
Tenant = Annotated[str, Field(pattern=TENANT)]


class Scope(StrEnum):
    """What a key allows. `write` includes `read`, and `admin` all."""

    READ = "read"
    """Every GET, of the tenant's own jobs, artifacts and statistics."""
    WRITE = "write"
    """Everything else that concerns jobs: to submit, cancel, retry and delete them."""
    ADMIN = "admin"
    """Creating, listing and revoking the keys of all tenants."""
    METRICS = "metrics"
    """GET /metrics, which counts jobs of all tenants, and nothing else: for what watches the service."""

    @property
    def included(self) -> frozenset["Scope"]:
        more = {Scope.WRITE: {Scope.READ}, Scope.ADMIN: set(Scope)}
        return frozenset({self} | more.get(self, set()))


def _is_text(value: object) -> object:
    if not isinstance(value, str | datetime):  # a number would be taken for seconds since 1970
        raise ValueError("is no time; write it as 2030-01-31T12:00:00Z")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is beyond the years 1 to 9999 in UTC") from error


def _is_printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("has control characters, which would reach the terminal of who lists keys")
    return name


Expiry = Annotated[
    AwareDatetime, BeforeValidator(_is_text, json_schema_input_type=AwareDatetime), AfterValidator(_in_utc)
]
Name = Annotated[str, Field(max_length=64), AfterValidator(_is_printable)]


class NewKey(Strict):
    """Body of `POST /keys`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: Name = ""
    """Name for people, such as that of the pipeline that uses the key."""
    tenant: Tenant = DEFAULT_TENANT
    """Tenant whose jobs the key's holder makes and sees; others' are a 404."""
    scopes: list[Scope] = Field(default_factory=lambda: [Scope.WRITE], min_length=1, max_length=10)
    """What the key allows: `read`, `write`, which includes `read`, `admin`, which
    includes both, or `metrics`, which allows `GET /metrics` alone."""
    expires_at: Expiry | None = None
    """Time from which the key is refused; null: never."""


class Key(BaseModel):
    """An API key as it is listed. Its secret is known to its holder alone."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The key's id, by which it is revoked."""
    prefix: str
    """The part of the key before its secret."""
    name: str
    """Name for people."""
    tenant: str
    """Tenant whose jobs its holder makes and sees."""
    scopes: list[Scope]
    """What it allows."""
    created_at: AwareDatetime
    """Time at which it was made."""
    expires_at: AwareDatetime | None
    """Time from which it is refused; null: never."""
    last_used_at: AwareDatetime | None
    """Time of its last use, to the minute; null: never used."""
    revoked_at: AwareDatetime | None
    """Time from which it is refused because it was revoked; null: it was not."""


class KeyList(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    data: list[Key]
    """All keys, oldest first."""


class CreatedKey(Key):
    key: str
    """The whole key, with its secret. It is told this once, and only its digest is kept."""


class Caller(BaseModel):
    """Who sends a request."""

    model_config = ConfigDict(frozen=True)

    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = frozenset({Scope.ADMIN})
    """Scopes of the key; all where there are no keys."""
    key_id: str | None = None
    """Id of the key; None where there are no keys."""

    def may(self, scope: Scope) -> bool:
        return any(scope in granted.included for granted in self.scopes)
