"""Deliveries of events to webhooks, as Redis keeps them.

The scripts that change a job record what its webhook is to be told. A deliverer claims a delivery for the time of a
lease, sends it, and settles it. If it dies before that, the delivery is due again when the lease is over, so that each
is sent at least once, however many deliverers there are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from redis import Redis

from app.contracts.webhooks import Delivery, DeliveryAttempt, DeliveryLog, DeliveryState, JobWebhook, WebhookEvent
from app.storage.keys import Keys
from app.storage.scripts import JobScripts, source

RECEIVERS_PAGE = 500
ATTEMPTS_KEPT = 50  # newest attempts of a delivery, 8 kB; retries for 72 hours are 40 or so


@dataclass(frozen=True)
class Claimed:
    """A delivery that is ours to send until its lease is over."""

    job_id: str
    n: int
    claim: int
    """Number of the claim: an attempt of an earlier one is not recorded."""
    event: WebhookEvent
    created_ms: int
    since_ms: int
    """Time at which its retries began: that of the event, or of the last redelivery."""
    tries: int
    """Number of attempts since then."""
    snapshot: Mapping[str, str]
    """The job in short when the event happened, as its record has it."""
    webhook: JobWebhook

    @property
    def id(self) -> str:
        return message_id(self.job_id, self.n)


def message_id(job_id: str, n: int) -> str:
    """Return a delivery's `webhook-id`."""
    return f"msg_{job_id}_{n}"


class Deliveries:
    """Stores deliveries. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys, scripts: JobScripts) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts
        self._claim = redis.register_script(source("claim_delivery"))

    def receivers(self) -> Iterator[str]:
        """Yield the receivers that something is due for, those that have waited longest first.

        They are read in pages. One that is claimed from meanwhile leaves its place, so a few may be left out.
        """
        now, start = self._scripts.clock(), 0
        while True:
            found = self._redis.zrangebyscore(self._keys.receivers, "-inf", now, start=start, num=RECEIVERS_PAGE)
            yield from cast(list[str], found)
            if len(cast(list[str], found)) < RECEIVERS_PAGE:
                return
            start += RECEIVERS_PAGE

    def claim(self, receiver: str, lease_ms: int) -> Claimed | None:
        """Take the delivery to a receiver that has been due for longest. Returns None when none is due."""
        while True:
            now = self._scripts.clock()
            found = cast(list[Any] | None, self._claim(keys=[self._keys.receivers], args=[now, receiver, lease_ms]))
            if not found:
                return None
            claimed = self._read(str(found[0]), int(found[1]))
            if claimed is not None:  # otherwise its job was deleted between the two reads, and the delivery with it
                return claimed

    def settle(
        self,
        claimed: Claimed,
        attempt: DeliveryAttempt,
        state: DeliveryState,
        next_ms: int | None = None,
        *,
        is_gone: bool = False,
    ) -> bool:
        """Record an attempt and what follows from it. Returns False when the claim is over, or the job is deleted.

        Args:
            next_ms: time of the next attempt, if the delivery is pending.
            is_gone: the receiver wants nothing more, so all other deliveries of the job end too.
        """
        arguments = [
            claimed.n,
            claimed.claim,
            attempt.model_dump_json(),
            ATTEMPTS_KEPT,
            state,
            next_ms or "",
            int(is_gone),
        ]
        return bool(self._scripts.run("settle_delivery", claimed.job_id, [], arguments))

    def release(self, claimed: Claimed) -> None:
        """Give a delivery back that was not sent to its end; it is due at once."""
        now = self._scripts.clock()
        name, receiver = self._name(claimed.job_id, claimed.n), claimed.webhook.receiver
        with self._redis.pipeline() as both:
            both.zadd(f"{self._keys.receivers}:{receiver}", {name: now}, xx=True)
            both.zadd(self._keys.receivers, {receiver: now}, xx=True)
            both.execute()

    def redeliver(self, job_id: str, n: int) -> Delivery | None:
        """Send a delivery again, from now on. Returns it; None where there is no such delivery."""
        return self.get(job_id, n) if self._scripts.run("redeliver", job_id, [], [n]) else None

    def get(self, job_id: str, n: int) -> Delivery | None:
        """Return a delivery and its attempts; None where there is no such delivery."""
        found = self._log(job_id, [n]).data
        return found[0] if found else None

    def log(self, job_id: str) -> DeliveryLog:
        """Return the deliveries of a job, newest first."""
        numbers = cast(list[str], self._redis.zrange(self._keys.deliveries(job_id), 0, -1, desc=True))
        return self._log(job_id, [int(n) for n in numbers])

    def _log(self, job_id: str, numbers: Sequence[int]) -> DeliveryLog:
        """Return those of the deliveries that there are, all as they are at one moment."""
        record = self._keys.record(job_id)
        webhook = cast(str | None, self._redis.hget(record, "webhook"))
        if webhook is None:  # it had none, or it was deleted
            return DeliveryLog(data=[], disabled_at=None)
        queue = f"{self._keys.receivers}:{JobWebhook.model_validate_json(webhook).receiver}"
        with self._redis.pipeline(transaction=True) as reads:
            for n in numbers:
                name = self._name(job_id, n)
                reads.hmget(name, ["event", "state", "created_ms"])
                reads.lrange(f"{name}:attempts", 0, -1)
                reads.zscore(queue, name)
            reads.hget(record, "webhook_gone_ms")
            *found, gone_ms = reads.execute()
        each = zip(numbers, found[::3], found[1::3], found[2::3], strict=True)
        return DeliveryLog(
            data=[
                Delivery(
                    n=n,
                    id=message_id(job_id, n),
                    event=WebhookEvent(event),
                    state=DeliveryState(state),
                    created_at=_time(int(created_ms)),
                    next_attempt_at=None if due is None else _time(int(due)),
                    attempts=[DeliveryAttempt.model_validate_json(attempt) for attempt in attempts],
                )
                for n, (event, state, created_ms), attempts, due in each
                if event is not None
            ],
            disabled_at=None if gone_ms is None else _time(int(gone_ms)),
        )

    def _read(self, name: str, claim: int) -> Claimed | None:
        job_id, n = name.rsplit(":", 2)[1:]
        with self._redis.pipeline() as reads:
            reads.hgetall(name)
            reads.hget(self._keys.record(job_id), "webhook")
            fields, webhook = reads.execute()
        if "event" not in fields or webhook is None:
            return None
        return Claimed(
            job_id=job_id,
            n=int(n),
            claim=claim,
            event=WebhookEvent(fields["event"]),
            created_ms=int(fields["created_ms"]),
            since_ms=int(fields["since_ms"]),
            tries=int(fields["tries"]),
            snapshot=json.loads(fields["snapshot"]),
            webhook=JobWebhook.model_validate_json(webhook),
        )

    def _name(self, job_id: str, n: int) -> str:
        return f"{self._keys.deliveries(job_id)}:{n}"


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
