"""Webhooks from the change of a job to its receiver: a real Redis, real receivers, a clock that the test moves."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from redis import Redis
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from app.contracts.api_keys import Caller
from app.contracts.jobs import Attempt, ErrorCode, JobError, PhaseName, Progress, Stage, Status, TaskId
from app.contracts.webhooks import DeliveryAttempt, DeliveryLog, DeliveryState, JobWebhook, Webhook, signer_of
from app.observability.logs import JsonLines
from app.services.deliverer import MOST_PER_RECEIVER, RETRY_FOR_MS, SETTLING_S, Deliverer
from app.services.webhook_sender import Sender
from app.storage.deliveries import ATTEMPTS_KEPT
from app.storage.jobs import JobStore
from app.storage.keys import Keys
from app.storage.records import Deleted, NewJob
from app.storage.scripts import DELIVERIES_KEPT
from app.storage.signing_secrets import MOST_SECRETS, SigningSecrets, TooManySecrets
from tests.clock import Clock
from tests.conftest import RESULT, wait_until
from tests.receivers import Received, Receiver, answering, closing, endless, receiving, stalling

TIMEOUT_S = 0.3
PROGRESS_S = 10
EVERYTHING = ["job.started", "job.progress", "job.succeeded", "job.failed", "job.cancelled"]
FAILURE = JobError(code=ErrorCode.INTERNAL, message="broken")
JUDGED = RESULT.model_copy(update={"accepted": False, "notes": ["it misses what accept asks for"]})
ARRIVED = DeliveryAttempt(at=datetime.now(UTC), seconds=0.1, status=204, error=None)
SIGNER = signer_of(Caller())


@pytest.fixture
def clock() -> Clock:
    """Begins now, because receivers compare timestamps of signatures with their own clocks."""
    return Clock(int(time.time() * 1000))


@pytest.fixture
def store(redis: Redis, clock: Clock) -> JobStore:
    return JobStore(redis, "hooks", 10, 3, clock)


@pytest.fixture
def secrets(redis: Redis, clock: Clock) -> SigningSecrets:
    return SigningSecrets(redis, "hooks", clock)


@pytest.fixture
def secret(secrets: SigningSecrets) -> str:
    return secrets.rotate(SIGNER, 0).secret


def new_job(
    store: JobStore, url: str, *events: str, name: str = "topics+sentiment", tenant: str = "default", **fields: Any
) -> TaskId:
    asked = Webhook.model_validate({"url": url, "events": list(events) or EVERYTHING})
    webhook = JobWebhook.of(asked, tenant, SIGNER, PROGRESS_S)
    request, labels = {"secret rows": "of the request"}, {"team": "ümlaut"}
    job = NewJob(request, name, labels=labels, tenant=tenant, webhook=webhook, **fields)
    return TaskId(job=store.records.create(job).job_id, stage=Stage.MERGE)


def begun(store: JobStore, task: TaskId) -> Attempt:
    attempt = store.tasks.claim("w")
    assert attempt is not None
    assert attempt.task == task
    return attempt


def halfway(done: int) -> Progress:
    return Progress(phase=PhaseName.SCORING, done=done, total=4096, unit="examples", fraction=0.5)


@contextmanager
def delivering(
    store: JobStore, secrets: SigningSecrets, timeout_s: float = TIMEOUT_S, **options: Any
) -> Iterator[None]:
    """A deliverer in an event loop of its own, as the API has it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    sender = Sender(allow_private=True, timeout_s=timeout_s)
    options = {"chance": lambda: 1.0, "poll_s": 0.01, **options}
    deliverer = Deliverer(store, secrets, sender, timeout_s, **options)
    loop.call_soon_threadsafe(deliverer.start)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(deliverer.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def settled(store: JobStore, job: str) -> DeliveryLog:
    """The deliveries of a job, once none of them waits."""

    def all_settled() -> DeliveryLog | None:
        log = store.deliveries.log(job)
        return None if any(one.state is DeliveryState.PENDING for one in log.data) else log

    log: DeliveryLog = wait_until(all_settled, "every delivery to be settled", 30, 0.005)
    return log


def attempted(store: JobStore, job: str, times: int, n: int = 1) -> None:
    def is_recorded() -> bool:
        delivery = store.deliveries.get(job, n)
        return delivery is not None and len(delivery.attempts) >= times

    wait_until(is_recorded, f"attempt {times} of delivery {n}", 30, 0.005)


def told(receiver: Receiver) -> list[str]:
    return [json.loads(received.body)["type"] for received in receiver.received]


def test_a_job_tells_what_happens_to_it_and_not_its_request(
    store: JobStore, secrets: SigningSecrets, secret: str
) -> None:
    with receiving() as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url)
        assert store.tasks.succeed(begun(store, task), JUDGED, "artifact")
        log = settled(store, task.job)
    messages = {message["type"]: message for message in (json.loads(one.body) for one in receiver.received)}
    assert set(messages) == {"job.started", "job.succeeded"}
    started, succeeded = messages["job.started"], messages["job.succeeded"]
    assert set(started) == {"type", "timestamp", "data"}
    assert datetime.fromisoformat(started["timestamp"]) == log.data[-1].created_at
    assert (started["data"]["status"], started["data"]["progress"]["phase"]) == ("running", "loading")
    assert started["data"]["result"] is None
    [summary] = list(store.records.newest())
    assert succeeded["data"] == summary.public().model_dump(mode="json")
    assert succeeded["data"]["result"]["accepted"] is False
    assert succeeded["data"]["labels"] == {"team": "ümlaut"}
    assert b"of the request" not in b"".join(one.body for one in receiver.received)
    assert {one.event: one.attempts[0].status for one in log.data} == {"job.started": 204, "job.succeeded": 204}


def test_the_message_is_the_job_as_it_was_when_the_event_happened(
    store: JobStore, secrets: SigningSecrets, secret: str
) -> None:
    """Every attempt sends the same bytes under the same id, whatever becomes of the job meanwhile."""
    with receiving(answering(500), answering(204)) as receiver:
        task = new_job(store, receiver.url, "job.started")
        attempt = begun(store, task)
        with delivering(store, secrets, chance=lambda: 0.0):
            attempted(store, task.job, 1)
            store.tasks.fail(attempt, FAILURE)
            settled(store, task.job)
    first, second = receiver.received
    assert first.body == second.body
    assert json.loads(first.body)["data"]["status"] == "running"
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == f"msg_{task.job}_1"


def test_events_are_told_that_were_asked_for(store: JobStore, secrets: SigningSecrets, secret: str) -> None:
    with receiving() as receiver, delivering(store, secrets):
        failed = new_job(store, receiver.url, "job.failed", "job.cancelled")
        store.tasks.fail(begun(store, failed), FAILURE)
        cancelled = new_job(store, receiver.url, "job.failed", "job.cancelled")
        store.records.cancel(cancelled.job)
        stopped = new_job(store, receiver.url, "job.cancelled")
        attempt = begun(store, stopped)
        store.records.cancel(stopped.job)
        store.tasks.acknowledge_cancel(attempt)
        lost = new_job(store, receiver.url, "job.failed")
        for _ in range(3):
            store.tasks.release(begun(store, lost), lost=True)
        for task in (failed, cancelled, stopped, lost):
            settled(store, task.job)
        silent = NewJob({}, "without a webhook")
        assert store.deliveries.log(store.records.create(silent).job_id).data == []
    assert sorted(told(receiver)) == ["job.cancelled", "job.cancelled", "job.failed", "job.failed"]
    errors = [json.loads(one.body)["data"]["error"] for one in receiver.received]
    assert sorted(error["code"] for error in errors if error) == ["internal", "worker_lost"]


def test_a_deadline_and_a_retry_are_told(store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock) -> None:
    with receiving() as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url, deadline_seconds=5)
        clock.advance(6)
        assert store.records.time_out() == 1
        store.records.retry(task.job)
        begun(store, task)
        settled(store, task.job)
    assert told(receiver) == ["job.failed", "job.started"]


def test_progress_is_told_at_most_every_so_often_and_sent_once(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving(answering(500)) as receiver:
        task = new_job(store, receiver.url, "job.progress")
        attempt = begun(store, task)
        for done in range(3):
            store.tasks.renew(attempt, halfway(done))
        clock.advance(PROGRESS_S)
        store.tasks.renew(attempt, halfway(3))  # the first one was not sent yet, so no second one waits behind it
        assert [one.n for one in store.deliveries.log(task.job).data] == [1]
        with delivering(store, secrets):
            [delivery] = settled(store, task.job).data
            assert (delivery.state, len(delivery.attempts)) == (DeliveryState.FAILED, 1)
            store.tasks.renew(attempt, halfway(4))
            settled(store, task.job)
            clock.advance(PROGRESS_S - 1)
            store.tasks.renew(attempt, halfway(5))
            settled(store, task.job)
    assert [json.loads(one.body)["data"]["progress"]["done"] for one in receiver.received] == [0, 4]


def verified(received: Received, secret: str) -> bool:
    """Whether both the library and plain HMAC find a signature of this secret. They must agree."""
    try:
        Verifier(secret).verify(received.body, received.headers)
        by_library = True
    except WebhookVerificationError:
        by_library = False
    headers = received.headers
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + received.body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    by_hand = signature in headers["webhook-signature"].split(" ")
    assert by_hand == by_library
    return by_library


def test_old_and_new_secret_sign_during_the_overlap(store: JobStore, secrets: SigningSecrets, clock: Clock) -> None:
    old = secrets.rotate(SIGNER, 0)
    assert old.former_until is None

    def sent() -> Received:
        with receiving() as receiver, delivering(store, secrets):
            task = new_job(store, receiver.url, "job.cancelled")
            store.records.cancel(task.job)
            settled(store, task.job)
        return receiver.received[0]

    first = sent()
    assert verified(first, old.secret)
    assert not verified(Received(first.path, first.headers, first.body + b" "), old.secret)
    new = secrets.rotate(SIGNER, 60)
    assert new.former_until == datetime.fromtimestamp((clock() + 60_000) / 1000, UTC)
    both = sent()
    assert verified(both, old.secret)
    assert verified(both, new.secret)
    clock.advance(60)
    later = sent()
    assert not verified(later, old.secret)
    assert verified(later, new.secret)
    newest = secrets.rotate(SIGNER, 0)
    assert secrets.active(SIGNER) == [newest.secret]
    assert secrets.active("0" * 16) == []


def test_no_more_secrets_sign_than_a_header_has_room_for(secrets: SigningSecrets) -> None:
    made = [secrets.rotate(SIGNER, 60).secret for _ in range(MOST_SECRETS)]
    assert set(secrets.active(SIGNER)) == set(made)
    with pytest.raises(TooManySecrets, match="overlap of 0"):
        secrets.rotate(SIGNER, 60)
    assert len(secrets.active(SIGNER)) == MOST_SECRETS
    assert secrets.rotate(SIGNER, 0).secret == secrets.active(SIGNER)[0]
    assert len(secrets.active(SIGNER)) == 1


def test_without_a_secret_nothing_is_sent_and_the_log_says_why(store: JobStore, secrets: SigningSecrets) -> None:
    with receiving() as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        attempted(store, task.job, 1)
        secrets.rotate(SIGNER, 0)
    delivery = store.deliveries.get(task.job, 1)
    assert delivery is not None
    assert delivery.state is DeliveryState.PENDING
    assert "no secret to sign with" in (delivery.attempts[0].error or "")
    assert receiver.received == []


def test_a_delivery_is_retried_for_72_hours_then_given_up_and_sent_again_by_request(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving(answering(500)) as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        began, times, waits = clock(), 0, []
        while True:
            times += 1
            attempted(store, task.job, min(times, ATTEMPTS_KEPT))
            delivery = store.deliveries.get(task.job, 1)
            assert delivery is not None
            if delivery.state is not DeliveryState.PENDING:
                break
            assert delivery.next_attempt_at is not None
            due = int(delivery.next_attempt_at.timestamp() * 1000)
            waits.append(due - clock())
            clock.now = due
        assert delivery.state is DeliveryState.FAILED
        assert clock() - began == RETRY_FOR_MS
        assert waits[:4] == [10_000, 20_000, 40_000, 80_000]
        assert max(waits) == 6 * 3_600_000
        assert len(receiver.received) == times
        assert "answered 500" in (delivery.attempts[-1].error or "")

        receiver.behaviours = [answering(204)]
        assert store.deliveries.redeliver(task.job, 2) is None
        again = store.deliveries.redeliver(task.job, 1)
        assert again is not None
        assert again.state is DeliveryState.PENDING
        [done] = settled(store, task.job).data
    assert done.state is DeliveryState.DELIVERED
    assert done.next_attempt_at is None
    assert len({one.headers["webhook-id"] for one in receiver.received}) == 1


def test_a_receiver_is_left_alone_for_as_long_as_it_asks(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving(answering(429, Retry_After="3600"), answering(204)) as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        attempted(store, task.job, 1)
        [delivery] = store.deliveries.log(task.job).data
        assert delivery.next_attempt_at == datetime.fromtimestamp((clock() + 3_600_000) / 1000, UTC)
        clock.advance(3600)
        settled(store, task.job)
    assert len(receiver.received) == 2


def test_410_ends_all_further_deliveries_of_the_job_and_a_redelivery_begins_again(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving(answering(500), answering(410), answering(204)) as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url)
        attempt = begun(store, task)
        attempted(store, task.job, 1)
        store.tasks.release(attempt, lost=True)
        begun(store, task)  # its event is answered with 410
        log = settled(store, task.job)
        assert {one.n: one.state for one in log.data} == {1: DeliveryState.DISABLED, 2: DeliveryState.FAILED}
        assert log.disabled_at == datetime.fromtimestamp(clock() / 1000, UTC)
        assert "nothing more of this job is sent" in (log.data[0].attempts[-1].error or "")
        clock.advance(3600)
        store.records.cancel(task.job)
        assert len(store.deliveries.log(task.job).data) == 2, "nothing is recorded any more"
        other = new_job(store, receiver.url, name="another job")
        begun(store, other)
        assert settled(store, other.job).data[0].state is DeliveryState.DELIVERED
        assert store.deliveries.redeliver(task.job, 2) is not None
        store.deliveries.redeliver(task.job, 1)
        log = settled(store, task.job)
        assert log.disabled_at is None
    assert {one.state for one in log.data} == {DeliveryState.DELIVERED}


def test_the_log_shows_one_moment(store: JobStore) -> None:
    """Where nothing waits because the receiver wants nothing more, it says so, whenever it is read."""
    task = new_job(store, "http://127.0.0.1:1/hook", "job.started")
    store.tasks.release(begun(store, task), lost=True)
    begun(store, task)
    over = threading.Event()

    def read() -> int:
        reads = 0
        while not over.is_set():
            log = store.deliveries.log(task.job)
            assert log.disabled_at or any(one.state is DeliveryState.PENDING for one in log.data), log
            reads += 1
        return reads

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for _ in range(50):
            claimed = store.deliveries.claim("default 127.0.0.1:1", 1000)
            assert claimed is not None
            gone = ARRIVED.model_copy(update={"status": 410, "error": "gone"})
            assert store.deliveries.settle(claimed, gone, DeliveryState.FAILED, is_gone=True)
            for n in (1, 2):
                assert store.deliveries.redeliver(task.job, n) is not None
        over.set()
    assert reading.result() > 20


def test_one_receiver_that_stalls_delays_no_other_and_is_asked_by_few_at_once(
    store: JobStore, secrets: SigningSecrets, secret: str
) -> None:
    with receiving(stalling) as stalled, receiving() as receiver:
        for _ in range(5 * MOST_PER_RECEIVER):
            store.records.cancel(new_job(store, stalled.url, "job.cancelled").job)
        jobs = [new_job(store, receiver.url, "job.cancelled").job for _ in range(20)]
        for job in jobs:
            store.records.cancel(job)
        with delivering(store, secrets, 30):
            for job in jobs:
                assert settled(store, job).data[0].state is DeliveryState.DELIVERED
            wait_until(lambda: len(stalled.received) >= MOST_PER_RECEIVER, "the stalled receiver to be full", 10)
            assert len(stalled.received) == MOST_PER_RECEIVER
            stalled.let_go.set()


def test_a_tenant_whose_receivers_all_stall_delays_no_other_tenant(
    store: JobStore,
    secrets: SigningSecrets,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It gets half of the places. The log of the other's delivery says whose it is."""
    monkeypatch.setattr("app.services.deliverer.MOST_AT_ONCE", 4)
    caplog.handler.setFormatter(JsonLines("api"))
    with receiving(stalling) as first, receiving(stalling) as second, receiving() as receiver:
        for stalled in (first, second) * MOST_PER_RECEIVER:
            store.records.cancel(new_job(store, stalled.url, "job.cancelled", tenant="many").job)
        with caplog.at_level(logging.INFO, "app.services.deliverer"), delivering(store, secrets, 30):
            wait_until(lambda: len(first.received) + len(second.received) == 2, "half of the places to be taken")
            job = new_job(store, receiver.url, "job.cancelled", tenant="few").job
            store.records.cancel(job)
            assert settled(store, job).data[0].state is DeliveryState.DELIVERED
            assert len(first.received) + len(second.received) == 2
            for stalled in (first, second):
                stalled.let_go.set()
    [line] = [line for line in map(json.loads, caplog.text.splitlines()) if job in line["message"]]
    assert f" to 127.0.0.1:{receiver.port}: attempt 1 is delivered" in line["message"]
    assert (line["job"], line["tenant"]) == (job, "few")


@pytest.mark.parametrize("behaviour", [stalling, closing, endless, answering(302, Location="http://127.0.0.1/")])
def test_whatever_a_receiver_does_a_later_attempt_arrives(
    store: JobStore, secrets: SigningSecrets, secret: str, behaviour: Callable[..., None]
) -> None:
    with receiving(behaviour, answering(204)) as receiver, delivering(store, secrets, chance=lambda: 0.0):
        task = new_job(store, receiver.url, "job.failed")
        store.tasks.fail(begun(store, task), FAILURE)
        [delivery] = settled(store, task.job).data
        receiver.let_go.set()
    assert delivery.state is DeliveryState.DELIVERED
    assert len(delivery.attempts) == (1 if behaviour is endless else 2)


def test_a_delivery_of_a_deliverer_that_died_is_due_again_when_its_lease_is_over(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    lease_ms = int((TIMEOUT_S + SETTLING_S) * 1000)
    with receiving() as receiver:
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        [name] = store.deliveries.receivers()
        claimed = store.deliveries.claim(name, lease_ms)  # by one that dies then
        assert claimed is not None
        assert store.deliveries.claim(name, lease_ms) is None
        clock.advance(lease_ms / 1000)
        with delivering(store, secrets):
            [delivery] = settled(store, task.job).data
        assert delivery.state is DeliveryState.DELIVERED
        late = delivery.attempts[0].model_copy(update={"status": 500, "error": "late"})
        assert not store.deliveries.settle(claimed, late, DeliveryState.FAILED), "a claim that is over records nothing"
        assert store.deliveries.log(task.job).data == [delivery]


def test_several_deliverers_send_each_delivery_once(
    redis: Redis, store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    other = JobStore(redis, "hooks", 10, 3, clock)
    with receiving() as receiver:
        jobs = [new_job(store, receiver.url, "job.cancelled").job for _ in range(40)]
        for job in jobs:
            store.records.cancel(job)
        with delivering(store, secrets), delivering(other, secrets):
            for job in jobs:
                settled(store, job)
    assert sorted(one.headers["webhook-id"] for one in receiver.received) == sorted(f"msg_{job}_1" for job in jobs)


def test_a_deliverer_that_stops_gives_back_what_it_did_not_end(
    store: JobStore, secrets: SigningSecrets, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.deliverer.STOP_S", 0.05)
    with receiving(stalling, answering(204)) as receiver:
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        with delivering(store, secrets, 30):
            wait_until(lambda: receiver.received, "the attempt")
        with delivering(store, secrets):  # at once, though the clock has not moved and the lease is not over
            [delivery] = settled(store, task.job).data
    assert (delivery.state, len(receiver.received)) == (DeliveryState.DELIVERED, 2)


def test_the_log_is_bounded_and_what_waits_stays(
    store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving() as receiver:
        waiting = new_job(store, receiver.url, "job.started", "job.progress")
        attempt = begun(store, waiting)
        first = store.deliveries.claim(next(store.deliveries.receivers()), 10**9)  # it waits, whatever comes later
        assert first is not None
        for done in range(DELIVERIES_KEPT + 20):
            clock.advance(PROGRESS_S)
            store.tasks.renew(attempt, halfway(done))
            claimed = store.deliveries.claim(first.webhook.receiver, 10**9)
            assert claimed is not None
            store.deliveries.settle(claimed, ARRIVED, DeliveryState.DELIVERED)
    numbers = [one.n for one in store.deliveries.log(waiting.job).data]
    assert len(numbers) == DELIVERIES_KEPT
    assert numbers[-1] == first.n
    assert numbers[0] == DELIVERIES_KEPT + 21


def test_of_deliveries_that_wait_too_there_is_a_limit_and_the_log_tells_what_was_dropped(
    store: JobStore, redis: Redis, secret: str
) -> None:
    more = 5
    with receiving() as receiver:
        task = new_job(store, receiver.url, "job.cancelled")
        for _ in range(DELIVERIES_KEPT + more):
            assert store.records.cancel(task.job) is Status.CANCELLED
            assert store.records.retry(task.job)
        numbers = [one.n for one in store.deliveries.log(task.job).data]
    assert numbers == list(range(DELIVERIES_KEPT + more, more, -1))
    found = cast(list[tuple[str, dict[str, str]]], redis.xrange(Keys("hooks").events(task.job)))
    logged = [event["message"] for _, event in found if event.get("code") == "delivery_dropped"]
    assert [message.split(" ")[1] for message in logged] == [str(n) for n in range(1, more + 1)]


def test_deliveries_are_removed_with_their_job(
    redis: Redis, store: JobStore, secrets: SigningSecrets, secret: str, clock: Clock
) -> None:
    with receiving(answering(500)) as receiver:
        task = new_job(store, receiver.url)
        attempt = begun(store, task)
        [name] = store.deliveries.receivers()
        claimed = store.deliveries.claim(name, 10)
        assert claimed is not None
        store.tasks.fail(attempt, FAILURE)
        assert len(store.deliveries.log(task.job).data) == 2
        assert store.records.delete(task.job) is Deleted.DONE
        assert store.deliveries.log(task.job) == DeliveryLog(data=[], disabled_at=None)
        assert not store.deliveries.settle(claimed, ARRIVED, DeliveryState.DELIVERED)
        store.deliveries.release(claimed)
        with delivering(store, secrets):
            clock.advance(60)
            wait_until(lambda: not list(store.deliveries.receivers()), "the receiver to be forgotten", 10, 0.005)
    assert receiver.received == []
    left = {name for name in redis.scan_iter("hooks:*") if "deliver" in name or "receivers" in name}
    assert left == set()


def test_an_outcome_is_logged_and_counted_and_hides_what_may_be_secret(
    store: JobStore, secrets: SigningSecrets, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with receiving(answering(503), answering(204)) as receiver:
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        with delivering(store, secrets, chance=lambda: 0.0):
            settled(store, task.job)
    attempts = [store.sums.read()[f"maskmerge_webhook_attempts_total {state}"] for state in ("pending", "delivered")]
    assert attempts == [1, 1]
    text = caplog.text
    assert f"webhook job.cancelled of job {task.job} to 127.0.0.1:{receiver.port}: attempt 1 is pending" in text
    assert "the receiver answered 503" in text
    assert "hidden-word" not in text
    assert "/hook" not in text
    assert secret.removeprefix("whsec_") not in text


def test_a_fault_of_the_service_counts_as_an_attempt(store: JobStore, secrets: SigningSecrets, redis: Redis) -> None:
    redis.zadd(
        "hooks:webhook-secrets:default", {"whsec_": "+inf"}
    )  # no such secret is ever made; the library refuses it
    with receiving() as receiver, delivering(store, secrets):
        task = new_job(store, receiver.url, "job.cancelled")
        store.records.cancel(task.job)
        attempted(store, task.job, 1)
    [delivery] = store.deliveries.log(task.job).data
    assert delivery.attempts[0].error == "the service failed; its log says why"
    assert delivery.state is DeliveryState.PENDING
    assert store.records.get(task.job).status is Status.CANCELLED  # type: ignore[union-attr]
