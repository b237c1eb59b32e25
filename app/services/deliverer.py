"""Tells webhooks what is due, for as long as the API runs. Several may run, because each claims what it sends."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from anyio.to_thread import run_sync
from redis.exceptions import RedisError

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.webhooks import DAY_S, DeliveryAttempt, DeliveryState, WebhookEvent, host_of, tenant_of
from app.observability.context import concerning
from app.services.webhook_messages import job_message, signed
from app.services.webhook_sender import Answer, Sender
from app.storage.deliveries import Claimed
from app.storage.jobs import JobStore
from app.storage.signing_secrets import SigningSecrets

RETRY_FOR_MS = 3 * DAY_S * 1000  # from the event, or from a redelivery
FIRST_DELAY_S = 10.0  # longest wait before the second attempt; it doubles with every further one
LONGEST_DELAY_S = 6 * 3600.0  # also of `Retry-After`
POLL_S = 0.5
AWAY_S = 2.0  # time between two looks while Redis is away
MOST_AT_ONCE = 64  # attempts of one process, each a connection
MOST_PER_RECEIVER = 4  # attempts at one host and port for one tenant, so that one that stalls holds up no other
STOP_S = 3.0  # time that attempts have to end when the service stops; what has not is sent again
SETTLING_S = 5.0  # time beyond an attempt's own within which its outcome is recorded
GONE = "nothing more of this job is sent until a delivery is sent again by request"

logger = logging.getLogger(__name__)


class Deliverer:
    """Claims deliveries that are due, sends them, and records how it went.

    Args:
        timeout_s: time that an attempt of the sender has.
        chance: returns a number from 0 to 1, by which retries are spread.
        poll_s: seconds between two looks at what is due.
    """

    def __init__(
        self,
        store: JobStore,
        secrets: SigningSecrets,
        sender: Sender,
        timeout_s: float,
        *,
        chance: Callable[[], float] = random.random,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._secrets = secrets
        self._sender = sender
        self._lease_ms = int((timeout_s + SETTLING_S) * 1000)
        self._chance = chance
        self._poll_s = poll_s
        self._task: asyncio.Task[None] | None = None
        self._sending: dict[asyncio.Task[None], Claimed] = {}
        self._news = asyncio.Event()
        self._stopping = False

    def start(self) -> None:
        """Begin to deliver, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take nothing more, let attempts end, and give back those that do not."""
        self._stopping = True
        self._news.set()
        if self._task is not None:
            await self._task
        if self._sending:
            await asyncio.wait(self._sending, timeout=STOP_S)
        for task, claimed in list(self._sending.items()):
            task.cancel()
            with suppress(asyncio.CancelledError, RedisError):
                await task
            with suppress(RedisError):  # it is due again when its lease is over
                await run_sync(self._store.deliveries.release, claimed)

    async def _run(self) -> None:
        while not self._stopping:
            self._news.clear()
            claimed: list[Claimed] = []
            pause_s = self._poll_s
            try:
                busy = Counter(claimed.webhook.receiver for claimed in self._sending.values())
                claimed = await run_sync(self._claim, busy)
            except RedisError as error:
                logger.warning("webhooks wait, Redis is away: %s", error)
                pause_s = AWAY_S
            except Exception:  # the next round may go better, and without rounds nobody would be told anything
                logger.exception("webhooks cannot be delivered")
            for delivery in claimed:
                task = asyncio.create_task(self._deliver(delivery))
                self._sending[task] = delivery
                task.add_done_callback(self._sent)
            if not claimed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._news.wait()

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.pop(task, None)
        self._news.set()

    def _claim(self, busy: Counter[str]) -> list[Claimed]:
        """Take one delivery for each receiver that may be sent more, those that have waited longest first.

        A tenant may have as many attempts as are left to others. So one whose receivers all stall takes half of them,
        two such tenants take two thirds, and there is always a place for a tenant that has none.
        """
        claimed: list[Claimed] = []
        left, taken = MOST_AT_ONCE - busy.total(), Counter[str]()
        for receiver, count in busy.items():
            taken[tenant_of(receiver)] += count
        for receiver in self._store.deliveries.receivers() if left > 0 else ():
            tenant = tenant_of(receiver)
            if busy[receiver] < MOST_PER_RECEIVER and taken[tenant] < left:
                delivery = self._store.deliveries.claim(receiver, self._lease_ms)
                if delivery is not None:
                    claimed.append(delivery)
                    taken[tenant] += 1
                    left -= 1
                    if left == 0:
                        break
        return claimed

    async def _deliver(self, claimed: Claimed) -> None:
        with concerning(job=claimed.job_id, tenant=claimed.snapshot.get("tenant", DEFAULT_TENANT)):
            await self._attempt_and_settle(claimed)

    async def _attempt_and_settle(self, claimed: Claimed) -> None:
        try:
            answer = await self._attempt(claimed)
        except RedisError as error:  # nothing was sent; it is due again when its lease is over
            logger.warning("a webhook waits, Redis is away: %s", error)
            return
        except Exception:  # it counts as an attempt, so that it is not repeated without end
            logger.exception("delivery %s failed", claimed.id)
            answer = Answer(0.0, error="the service failed; its log says why")
        for _ in range(int(SETTLING_S)):
            try:
                await run_sync(self._settle, claimed, answer)
                return
            except RedisError as error:
                logger.warning("the outcome of delivery %s is not recorded yet, Redis is away: %s", claimed.id, error)
                await asyncio.sleep(1)

    async def _attempt(self, claimed: Claimed) -> Answer:
        body = job_message(claimed, self._store.records.summary(claimed.job_id, claimed.snapshot))
        secrets = await run_sync(self._secrets.active, claimed.webhook.signer)
        if not secrets:
            return Answer(0.0, error=f"there is no secret to sign with; make one for {claimed.webhook.signer}")
        return await self._sender.send(claimed.webhook.url, signed(claimed.id, body, secrets), body)

    def _settle(self, claimed: Claimed, answer: Answer) -> None:
        """Record an attempt's outcome. This is the one place where it is known."""
        now = self._store.clock()
        state, next_ms = judged(claimed, answer, now, self._chance())
        attempt = DeliveryAttempt(
            at=datetime.fromtimestamp(now / 1000, UTC),
            seconds=round(answer.seconds, 3),
            status=answer.status,
            error=f"{answer.error}; {GONE}" if answer.is_gone else answer.error,
        )
        if not self._store.deliveries.settle(claimed, attempt, state, next_ms, is_gone=answer.is_gone):
            logger.info("delivery %s is no longer ours, or its job was deleted", claimed.id)
            return
        level = logging.INFO if state is DeliveryState.DELIVERED else logging.WARNING
        # The URL's path and query may hold secrets, so host and port stand for it.
        logger.log(
            level, "webhook %s of job %s to %s: attempt %d is %s%s",
            claimed.event, claimed.job_id, host_of(claimed.webhook.receiver), claimed.tries + 1, state,
            "" if answer.error is None else f", {answer.error}",
        )  # fmt: skip


def judged(claimed: Claimed, answer: Answer, now_ms: int, chance: float) -> tuple[DeliveryState, int | None]:
    """Return what becomes of a delivery after an attempt, and when it is sent again, in milliseconds since the epoch.

    Retries wait for a time between nothing and a longest one, which doubles (exponential back-off with full jitter),
    but at least for as long as the receiver asks. The last one is made when the 72 hours are over.
    """
    if answer.error is None:
        return DeliveryState.DELIVERED, None
    ends_ms = claimed.since_ms + RETRY_FOR_MS
    # Progress is sent once: it is of no use when newer progress is there.
    if answer.is_gone or claimed.event is WebhookEvent.PROGRESS or now_ms >= ends_ms:
        return DeliveryState.FAILED, None
    delay_s = chance * min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(claimed.tries, 30))
    delay_s = max(delay_s, min(LONGEST_DELAY_S, answer.retry_after_s or 0.0))
    return DeliveryState.PENDING, min(ends_ms, now_ms + int(delay_s * 1000))
