"""Webhooks: whom a job tells of what happens to it, and what became of every delivery."""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, HttpUrl, field_validator

from app.contracts.api_keys import DEFAULT_TENANT, Caller
from worker.engine.catalog.primitives.strict import Strict

DAY_S = 86_400
LONGEST_OVERLAP_S = 30 * DAY_S


class WebhookEvent(StrEnum):
    STARTED = "job.started"
    """An attempt began; a job that lost its worker tells it again, with the next `attempt`."""
    PROGRESS = "job.progress"
    """The work went on. It is told at most every `MASKMERGE_WEBHOOK_PROGRESS_SECONDS`, and sent once."""
    SUCCEEDED = "job.succeeded"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"


def _has_no_secret_parts(url: HttpUrl) -> HttpUrl:
    if url.username is not None or url.password is not None:
        raise ValueError("holds a user or a password; leave them out, the signature says who sends")
    if url.fragment is not None:
        raise ValueError("has a fragment, which is never sent; leave out # and what follows")
    return url


class Webhook(Strict):
    """A receiver of a job's events, as Standard Webhooks 1.0 describe them."""

    url: HttpUrl
    """Address to which events are posted, http or https. It must be public, unless the service allows others."""
    events: Annotated[tuple[WebhookEvent, ...], Field(min_length=1, max_length=10)] = (
        WebhookEvent.SUCCEEDED,
        WebhookEvent.FAILED,
    )
    """Events that are told."""

    _check_url = field_validator("url")(_has_no_secret_parts)


class JobWebhook(BaseModel):
    """A job's webhook as its record keeps it; the scripts that change the job read it too."""

    model_config = ConfigDict(frozen=True)

    url: str
    events: tuple[WebhookEvent, ...]
    progress_ms: int
    """Least time between two events of progress."""
    signer: str
    """Holder of the secret that signs; see `signer_of`."""
    receiver: str
    """Tenant, host and port, with a space between. Deliveries take turns among these. Webhooks of older releases have
    no tenant there."""

    @classmethod
    def of(cls, asked: Webhook, tenant: str, signer: str, progress_seconds: float) -> "JobWebhook":
        return cls(
            url=str(asked.url),
            events=asked.events,
            progress_ms=int(progress_seconds * 1000),
            signer=signer,
            receiver=f"{tenant} {asked.url.host}:{asked.url.port}",
        )


def host_of(receiver: str) -> str:
    """Return host and port of a receiver, which logs may show; path and query of its URL may hold secrets."""
    return receiver.rpartition(" ")[2]


def tenant_of(receiver: str) -> str:
    """Return the tenant whose jobs tell a receiver; the empty text for receivers of older releases."""
    return receiver.rpartition(" ")[0]


def signer_of(caller: Caller) -> str:
    """Return whose secret signs what a caller's jobs tell: the key's own, or that of all callers without a key."""
    return caller.key_id or DEFAULT_TENANT


class DeliveryState(StrEnum):
    """What becomes of a delivery; `Delivery.state` says what each means."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
    DISABLED = "disabled"


class DeliveryAttempt(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    at: AwareDatetime
    """Time at which it ended."""
    seconds: float
    """Time that it took."""
    status: int | None
    """Status of the receiver's answer; null where none came."""
    error: str | None
    """Why it counts as failed; null when it succeeded."""


class Delivery(BaseModel):
    """An event of a job that its webhook is told."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    n: int
    """Its number within the job."""
    id: str
    """The header `webhook-id`, the same in every attempt, by which a receiver knows what it has seen already."""
    event: WebhookEvent
    """What happened to the job."""
    state: DeliveryState
    """`pending`: it will be sent, or is being sent; `delivered`: the receiver answered 2xx; `failed`: it is not tried
    any more; `disabled`: it is not tried, because the receiver answered 410 to another delivery of the job."""
    created_at: AwareDatetime
    """Time of the event."""
    next_attempt_at: AwareDatetime | None
    """Time from which it is sent next; null unless it is pending."""
    attempts: list[DeliveryAttempt]
    """The newest attempts, at most 50."""


class DeliveryLog(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    data: list[Delivery]
    """Newest first. Of those that are not pending, the newest hundred are kept."""
    disabled_at: AwareDatetime | None
    """Time since which nothing more is sent, because the receiver answered 410; a redelivery ends that."""


class NewSecret(Strict):
    """Body of `POST /webhooks/secret`."""

    overlap_seconds: Annotated[int, Field(ge=0, le=LONGEST_OVERLAP_S)] = DAY_S
    """Time for which the former secret signs too, so that receivers can change over. 0 ends all former ones at once."""


class CreatedSecret(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    secret: str
    """The secret, `whsec_…`, with which receivers verify signatures. It is told this once."""
    signer: str
    """Holder of the secret: the id of an API key, or `default` for callers without one."""
    former_until: AwareDatetime | None
    """Time until which the former secret signs too; null where there is none."""


class ReceiverTest(Strict):
    """Body of `POST /webhooks/test`."""

    url: HttpUrl
    """Address to which the event `webhook.test` is posted, once."""

    _check_url = field_validator("url")(_has_no_secret_parts)


class ReceiverTestOutcome(DeliveryAttempt):
    id: str
    """The header `webhook-id`."""
    delivered: bool
    """Whether the receiver answered 2xx."""
