"""What receivers of webhooks read: the messages and their signatures, as Standard Webhooks 1.0 have them."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from standardwebhooks import Webhook as Signer

from app.contracts.jobs import RecordSummary
from app.storage.deliveries import Claimed

TEST_EVENT = "webhook.test"


def job_message(claimed: Claimed, job: RecordSummary) -> bytes:
    """Return the message of a job's event. Each attempt has the same one: the job as it was when the event happened."""
    at = datetime.fromtimestamp(claimed.created_ms / 1000, UTC)
    return _message(claimed.event, at, job.public().model_dump(mode="json"))


def trial_message(now: datetime) -> bytes:
    """Return the message of the event by which a receiver is tried out."""
    return _message(TEST_EVENT, now, {})


def signed(message_id: str, body: bytes, secrets: Iterable[str]) -> dict[str, str]:
    """Return the headers that say who sent a message, signed now with each of the secrets."""
    now, text = datetime.now(UTC), body.decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Signer(secret).sign(message_id, now, text) for secret in secrets),
    }


def _message(kind: str, at: datetime, data: dict[str, Any]) -> bytes:
    timestamp = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": kind, "timestamp": timestamp, "data": data}, separators=(",", ":")).encode()
