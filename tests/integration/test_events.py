"""The events of a job as they are stored and as they go over the wire, against a real Redis."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
from fastapi.testclient import TestClient
from redis import Redis

from app.contracts.events import Event, EventKind, LogCode, LogEntry, StatusChange
from app.contracts.jobs import Attempt, ErrorCode, JobError, PhaseName, Progress, Stage, Status, TaskId
from app.contracts.settings import Settings
from app.embedded_redis import EmbeddedRedis
from app.main import create_app
from app.storage.connection import connect_for_watching
from app.storage.events import TURN_MS, JobWatcher
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from app.storage.scripts import PROGRESS_KEPT
from tests.conftest import BASE_URL, HANGS_S, HERE, RESULT, assert_problem, wait_until

MAX_LOSSES = 3
NOTES = ["2 of 200 rows of local:rows.jsonl are longer than 48 tokens and were truncated", "another"]
NOTED = RESULT.model_copy(update={"notes": NOTES})
FAILURE = JobError(
    code=ErrorCode.INVALID_DATASET, message="rows.jsonl: line 3 has no 'text'\nreally", detail={"line": 3}
)


def halfway(done: int = 1) -> Progress:
    return Progress(phase=PhaseName.SCORING, done=done, total=4096, unit="examples", fraction=0.5, eta_seconds=1.5)


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, "test", 10, MAX_LOSSES, clock=lambda: 1_800_000_000_123)


@pytest.fixture
def api(redis_url: str, redis: Redis, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(
        create_app(Settings(redis_url=redis_url, queue="test", data_dir=tmp_path)), BASE_URL, client=HERE
    ) as client:
        yield client


Read = Callable[..., list[Event]]


@pytest.fixture
def read(redis_url: str) -> Read:
    """All events of a job that has ended, from the first or after one."""

    async def follow(job_id: str, after: int) -> list[Event]:
        watcher = JobWatcher(connect_for_watching(redis_url, most=2, longest_wait_s=TURN_MS / 1000), "test")
        try:
            return [event async for event in watcher.follow(job_id, after)]
        finally:
            await watcher.close()

    return lambda job_id, after=0: asyncio.run(follow(job_id, after))


def new_job(store: JobStore) -> TaskId:
    return TaskId(job=store.records.create(NewJob({"some": "request"}, "name")).job_id, stage=Stage.MERGE)


def claimed(store: JobStore, task: TaskId) -> Attempt:
    attempt = store.tasks.claim("machine-1")
    assert attempt is not None
    assert attempt.task == task
    return attempt


def told(events: list[Event]) -> list[str]:
    """Status names, log codes and phases, in order."""
    words = []
    for event in events:
        match event.data:
            case StatusChange(status=status):
                words.append(status.value)
            case LogEntry(code=code):
                words.append(code.value)
            case Progress(phase=phase):
                words.append(f"{phase.value} {event.data.done}")
    return words


WIRE = """\
event: status
data: {"status":"queued","attempt":0,"error":null,"at":"2027-01-15T08:00:00.123000Z"}
id: 1

event: status
data: {"status":"running","attempt":1,"error":null,"at":"2027-01-15T08:00:00.123000Z"}
id: 2

event: log
data: {"code":"attempt_started","attempt":1,"message":"attempt 1 starts on worker machine-1",\
"at":"2027-01-15T08:00:00.123000Z"}
id: 3

event: progress
data: {"phase":"loading","done":0,"total":0,"unit":"","fraction":0.0,"eta_seconds":null,"models":{}}
id: 4

event: progress
data: {"phase":"scoring","done":1,"total":4096,"unit":"examples","fraction":0.5,"eta_seconds":1.5,"models":{}}
id: 5

event: status
data: {"status":"failed","attempt":1,"error":{"code":"invalid_dataset",\
"message":"rows.jsonl: line 3 has no 'text'\\nreally","retryable":false,"detail":{"line":3}},\
"at":"2027-01-15T08:00:00.123000Z"}
id: 6

"""


def test_the_wire_form_of_every_kind(store: JobStore, api: TestClient) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    store.tasks.renew(attempt, halfway())
    store.tasks.fail(attempt, FAILURE)
    response = api.get(f"/jobs/{task.job}/events")
    assert (response.status_code, response.text) == (200, WIRE)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache"
    assert {EventKind(line[7:]) for line in WIRE.splitlines() if line.startswith("event: ")} == set(EventKind)


LOG = """\
2027-01-15T08:00:00.123Z attempt 0 queued
2027-01-15T08:00:00.123Z attempt 1 running
2027-01-15T08:00:00.123Z attempt 1 attempt_started: attempt 1 starts on worker machine-1
"""
END = "2027-01-15T08:00:00.123Z attempt 1 failed: invalid_dataset: rows.jsonl: line 3 has no 'text'\\nreally\n"


def test_the_log_as_text_has_what_there_is_up_to_now(store: JobStore, api: TestClient) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    store.tasks.renew(attempt, halfway())
    response = api.get(f"/jobs/{task.job}/log")
    assert (response.status_code, response.text) == (200, LOG)
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    store.tasks.fail(attempt, FAILURE)
    assert api.get(f"/jobs/{task.job}/log").text == LOG + END, "a line break in a message begins no line"
    head = api.head(f"/jobs/{task.job}/log")
    assert (head.status_code, head.text, head.headers["Content-Length"]) == (200, "", str(len(LOG + END)))
    assert_problem(api.get(f"/jobs/{'0' * 28}/log"), 404, "not_found")


@pytest.mark.parametrize("after", range(7))
def test_a_reader_goes_on_after_the_last_event_it_has(store: JobStore, api: TestClient, after: int) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    store.tasks.renew(attempt, halfway())
    store.tasks.fail(attempt, FAILURE)
    response = api.get(f"/jobs/{task.job}/events", headers={"Last-Event-ID": str(after)})
    rest = "".join(f"{event}\n\n" for event in WIRE.split("\n\n")[after:-1])
    assert (response.status_code, response.text) == (200 if rest else 204, rest)
    assert rest or "Content-Type" not in response.headers


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "1-0", "9" * 40])
def test_a_malformed_last_event_id_is_refused(store: JobStore, api: TestClient, last: str) -> None:
    response = api.get(f"/jobs/{new_job(store).job}/events", headers={"Last-Event-ID": last})
    assert (response.status_code, response.json()["code"]) == (400, "malformed")
    assert "the id of an event of this job, a number" in response.json()["detail"]
    assert response.headers["Content-Type"] == "application/problem+json"


def test_the_events_of_an_unknown_job_are_not_found(api: TestClient) -> None:
    assert api.get(f"/jobs/{'0' * 28}/events").json()["code"] == "not_found"
    assert api.get("/jobs/nonsense/events").json()["code"] == "not_found"


def test_events_tell_the_whole_way_of_a_job_and_are_numbered_by_its_revision(store: JobStore, read: Read) -> None:
    task = new_job(store)
    store.tasks.release(claimed(store, task), lost=True)
    store.tasks.release(claimed(store, task), lost=False)
    attempt = claimed(store, task)
    store.tasks.renew(attempt, halfway())
    store.tasks.succeed(attempt, NOTED, "folder")
    events = read(task.job)
    start = ["running", "attempt_started", "loading 0"]
    again = ["queued", "queued 0"]
    assert told(events) == [
        "queued", *start, "attempt_lost", *again, *start, "attempt_handed_back", *again, *start,
        "scoring 1", "note", "note", "done 1", "succeeded",
    ]  # fmt: skip
    record = store.records.get(task.job)
    assert record is not None
    assert [event.id for event in events] == list(range(1, record.revision + 1))
    logged = [event.data for event in events if isinstance(event.data, LogEntry)]
    assert [entry.message for entry in logged if entry.code is LogCode.NOTE] == NOTES
    assert "loss 1 of 3" in next(entry.message for entry in logged if entry.code is LogCode.ATTEMPT_LOST)
    others = {LogCode.SCORING_CUT, LogCode.SHARDS_DONE, LogCode.DELIVERY_DROPPED}  # not of every job
    assert {entry.code for entry in logged} == set(LogCode) - others


def test_a_job_that_is_lost_too_often_says_why_it_failed(store: JobStore, read: Read) -> None:
    task = new_job(store)
    for _ in range(MAX_LOSSES):
        store.tasks.release(claimed(store, task), lost=True)
    last = read(task.job)[-1].data
    assert isinstance(last, StatusChange)
    assert last.error is not None
    assert (last.status, last.error.code) == (Status.FAILED, ErrorCode.WORKER_LOST)


def test_cancelling_is_told_whether_the_job_waits_runs_or_is_lost(store: JobStore, read: Read) -> None:
    waiting = new_job(store)
    store.records.cancel(waiting.job)
    assert told(read(waiting.job)) == ["queued", "cancelled"]
    running = new_job(store)
    attempt = claimed(store, running)
    store.records.cancel(running.job)
    store.tasks.acknowledge_cancel(attempt)
    assert told(read(running.job))[-2:] == ["cancelling", "cancelled"]
    lost = new_job(store)  # made now, since jobs of one millisecond have no order
    attempt = claimed(store, lost)
    store.records.cancel(lost.job)
    store.tasks.release(attempt, lost=True)
    assert told(read(lost.job))[-3:] == ["cancelling", "attempt_lost", "cancelled"]


def test_a_call_that_is_repeated_because_its_answer_got_lost_adds_no_event(
    store: JobStore, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.records.secrets.token_hex", lambda count: "0" * 2 * count)
    task = new_job(store)
    assert new_job(store) == task
    attempt = claimed(store, task)
    for _ in range(2):
        store.tasks.renew(attempt, halfway())
    store.tasks.renew(attempt)
    for _ in range(2):
        assert store.tasks.succeed(attempt, NOTED, "folder")
    ending = ["scoring 1", "note", "note", "done 1", "succeeded"]
    assert told(read(task.job)) == ["queued", "running", "attempt_started", "loading 0", *ending]


def test_a_write_that_is_refused_adds_no_event(store: JobStore, read: Read) -> None:
    task = new_job(store)
    old = claimed(store, task)
    store.tasks.release(old, lost=True)
    attempt = claimed(store, task)
    store.records.cancel(task.job)
    store.tasks.acknowledge_cancel(attempt)
    before = read(task.job)
    for late in (old, attempt):
        store.tasks.renew(late, halfway())
        store.tasks.fail(late, FAILURE)
        store.tasks.succeed(late, NOTED, "folder")
        store.tasks.release(late, lost=True)
    store.records.cancel(task.job)
    assert store.tasks.claim("machine-2") is None
    assert read(task.job) == before


def test_a_long_job_keeps_its_newest_progress_and_every_other_event(store: JobStore, redis: Redis, read: Read) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    count = PROGRESS_KEPT + 500
    for done in range(1, count + 1):
        store.tasks.renew(attempt, halfway(done))
    store.tasks.fail(attempt, FAILURE)
    events = told(read(task.job))
    assert events[:3] == ["queued", "running", "attempt_started"]
    kept = events[3:-1]
    assert PROGRESS_KEPT <= len(kept) <= PROGRESS_KEPT + 100  # Redis cuts in blocks of a hundred
    assert kept == [f"scoring {done}" for done in range(count - len(kept) + 1, count + 1)]
    assert events[-1] == "failed"
    assert (redis.memory_usage(f"test:progress:{task.job}", samples=0) or 0) < 200_000


def test_progress_is_forgotten_a_while_after_the_end_but_not_when_the_job_is_tried_again(
    store: JobStore, redis: Redis, read: Read
) -> None:
    task = new_job(store)
    store.tasks.fail(claimed(store, task), FAILURE)
    progress = f"test:progress:{task.job}"
    assert 0 < redis.ttl(progress) <= 3600
    assert redis.ttl(f"test:events:{task.job}") == -1
    store.records.retry(task.job)
    assert redis.ttl(progress) == -1
    store.tasks.fail(claimed(store, task), FAILURE)
    redis.delete(progress)  # as its expiry does
    start = ["running", "attempt_started"]
    assert told(read(task.job)) == ["queued", *start, "failed", "queued", *start, "failed"]


def test_a_retry_goes_on_in_the_same_log_and_the_earlier_end_does_not_end_the_stream(
    store: JobStore, read: Read, api: TestClient
) -> None:
    task = new_job(store)
    store.tasks.fail(claimed(store, task), FAILURE)
    seen = read(task.job)[-1].id
    assert api.get(f"/jobs/{task.job}/events", headers={"Last-Event-ID": str(seen)}).status_code == 204
    store.records.retry(task.job)
    attempt = claimed(store, task)
    store.tasks.succeed(attempt, NOTED, "folder")
    start = ["running", "attempt_started", "loading 0"]
    second = ["queued", "queued 0", *start, "note", "note", "done 1", "succeeded"]
    assert told(read(task.job)) == ["queued", *start, "failed", *second]
    assert told(read(task.job, seen)) == second
    errors = [event.data.error for event in read(task.job) if isinstance(event.data, StatusChange)]
    assert errors == [None, None, FAILURE, None, None, None]


def test_deleting_a_job_ends_its_readers_and_leaves_nothing_but_that_it_was(
    store: JobStore, redis: Redis, read: Read
) -> None:
    task = new_job(store)
    store.tasks.fail(claimed(store, task), FAILURE)
    assert store.records.delete(task.job)
    assert [key for key in redis.scan_iter("test:*") if task.job in str(key)] == [f"test:gone:{task.job}"]
    assert read(task.job) == []


def test_more_readers_than_connections_take_turns(store: JobStore, redis: Redis, redis_url: str) -> None:
    tasks = [new_job(store) for _ in range(6)]

    async def scenario() -> list[list[Event]]:
        watcher = JobWatcher(connect_for_watching(redis_url, most=2, longest_wait_s=TURN_MS / 1000), "test")

        async def follow(task: TaskId) -> list[Event]:
            return [event async for event in watcher.follow(task.job)]

        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(follow(task)) for task in tasks]
            await asyncio.to_thread(wait_until, lambda: int(redis.info("clients")["blocked_clients"]) == 2, "two turns")
            for task in tasks:
                await asyncio.to_thread(store.records.cancel, task.job)
        await watcher.close()
        return [reader.result() for reader in readers]

    assert [told(events) for events in asyncio.run(scenario())] == [["queued", "cancelled"]] * 6


def test_a_change_wakes_those_who_wait_for_it(store: JobStore, redis: Redis, redis_url: str) -> None:
    task = new_job(store)

    async def scenario() -> None:
        watcher = JobWatcher(connect_for_watching(redis_url, most=2, longest_wait_s=TURN_MS / 1000), "test")
        async with asyncio.timeout(TURN_MS / 1000 - 1), asyncio.TaskGroup() as group:
            group.create_task(watcher.change(task.job, 1, 60))
            group.create_task(watcher.end(task.job, 1, 60))
            await asyncio.to_thread(wait_until, lambda: int(redis.info("clients")["blocked_clients"]) == 2, "both")
            await asyncio.to_thread(store.records.cancel, task.job)
        await watcher.close()

    asyncio.run(scenario())


def test_a_slow_reader_holds_no_connection_and_misses_nothing(store: JobStore, redis_url: str) -> None:
    task = new_job(store)

    async def scenario() -> None:
        watcher = JobWatcher(connect_for_watching(redis_url, most=1, longest_wait_s=TURN_MS / 1000), "test")
        slow = watcher.follow(task.job)
        first = await anext(slow)
        attempt = claimed(store, task)
        store.tasks.renew(attempt, halfway())
        store.tasks.fail(attempt, FAILURE)
        quick = [event async for event in watcher.follow(task.job)]
        assert told(quick)[-1] == "failed"
        assert [first, *[event async for event in slow]] == quick
        await watcher.close()

    asyncio.run(scenario())


def test_readers_that_go_give_their_connections_back(store: JobStore, redis: Redis, redis_url: str) -> None:
    task = new_job(store)

    async def scenario() -> None:
        watcher = JobWatcher(connect_for_watching(redis_url, most=2, longest_wait_s=TURN_MS / 1000), "test")

        async def follow() -> None:
            async for _ in watcher.follow(task.job, after=1):
                pass

        for _ in range(5):  # cancelled as the server does: again at every await, until the last is left
            async with anyio.create_task_group() as group:
                for _ in range(8):
                    group.start_soon(follow)
                await asyncio.to_thread(
                    wait_until, lambda: int(redis.info("clients")["blocked_clients"]) == 2, "two to wait"
                )
                group.cancel_scope.cancel()
        store.records.cancel(task.job)
        assert told([event async for event in watcher.follow(task.job)]) == ["queued", "cancelled"]
        await watcher.close()

    asyncio.run(scenario())


def test_a_stream_whose_redis_goes_away_for_good_ends_and_the_next_one_is_refused(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL)
    with Redis.from_url(server.url, decode_responses=True) as redis:
        wait_until(server.socket.exists, "Redis to answer")
        task = new_job(JobStore(redis, "test", 10, MAX_LOSSES))
        path = f"/jobs/{task.job}/events"
        with (
            TestClient(
                create_app(Settings(redis_url=server.url, queue="test", data_dir=tmp_path)), BASE_URL, client=HERE
            ) as api,
            ThreadPoolExecutor(1) as pool,
        ):
            reading = pool.submit(api.get, path)
            wait_until(lambda: redis.info("clients")["blocked_clients"], "the reader to wait for news")
            process.kill()
            process.wait()
            response = reading.result(HANGS_S)
            assert response.status_code == 200
            assert [line for line in response.text.splitlines() if line.startswith("id: ")] == ["id: 1"]
            assert api.get(path).json()["code"] == "redis_unavailable"


def test_stopping_ends_every_wait(store: JobStore, redis_url: str) -> None:
    task = new_job(store)

    async def scenario() -> None:
        watcher = JobWatcher(connect_for_watching(redis_url, most=2, longest_wait_s=TURN_MS / 1000), "test")

        async def follow() -> list[Event]:
            return [event async for event in watcher.follow(task.job)]

        async with asyncio.timeout(TURN_MS / 1000 - 1), asyncio.TaskGroup() as group:
            reader = group.create_task(follow())
            group.create_task(watcher.change(task.job, 1, 60))
            group.create_task(watcher.end(task.job, 1, 60))
            await asyncio.sleep(0)
            watcher.stop()
        assert len(reader.result()) <= 1
        await watcher.change(task.job, 1, 60)
        await watcher.close()

    asyncio.run(scenario())
