"""The job store and the queue against a real Redis, with a clock that the test moves."""

import json
import re
from collections.abc import Callable

import pytest
from redis import Redis

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    Gone,
    JobError,
    JobKind,
    PhaseName,
    Progress,
    Record,
    Stage,
    Status,
    TaskId,
)
from app.storage.connection import connect_for_rq
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.reaper import SWEEP_S, Reaper
from app.storage.records import Deleted, Idempotency, NewJob
from app.storage.scripts import FOLDER
from tests.clock import Clock
from tests.conftest import RESULT
from worker.engine.catalog.contracts.report import MergeSummary, ScoreResult, Search, Timings

LEASE_S = 10
MAX_LOSSES = 3
SCORES = ScoreResult(models=[], method={}, timings=Timings(), peak_memory_bytes=1, device="cpu", notes=[])
SEARCHED = RESULT.model_copy(
    update={
        "candidates": [],
        "search": Search(
            objective="mean_retention", search_rows={"a": 1}, held_out_rows={}, min_retention={}, feasible=True,
            chosen=0, trials=[], failed=[],
        ),
    }
)  # fmt: skip
LONG = {"candidates", "search"}
FAILURE = JobError(code=ErrorCode.INTERNAL, message="broken")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(redis: Redis, clock: Clock) -> JobStore:
    return JobStore(redis, "test", LEASE_S, MAX_LOSSES, clock)


@pytest.fixture
def queue(redis: Redis, redis_url: str, store: JobStore) -> TaskQueue:
    return TaskQueue(connect_for_rq(redis_url), "test", store)


def new_job(store: JobStore, priority: int = 0, **labels: str) -> TaskId:
    job = NewJob({"some": "request"}, "name", labels, priority=priority)
    return TaskId(job=store.records.create(job).job_id, stage=Stage.MERGE)


def record_of(store: JobStore, task: TaskId) -> Record:
    record = store.records.get(task.job)
    assert record is not None
    return record


def claimed(store: JobStore, task: TaskId) -> Attempt:
    """The attempt at this task, which is the next."""
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    assert attempt.task == task
    return attempt


def waiting(store: JobStore) -> int:
    """The number of tasks that wait."""
    return sum(tenant.waiting for tenant in store.tasks.counts())


def test_a_new_job_is_queued_and_waits(store: JobStore) -> None:
    task = new_job(store, team="search")
    record = record_of(store, task)
    assert (record.status, record.attempt, record.revision) == (Status.QUEUED, 0, 1)
    assert record.request == {"some": "request"}
    assert record.labels == {"team": "search"}
    assert waiting(store) == 1


def test_a_job_has_its_kind_and_one_stored_before_there_were_kinds_is_a_merge(store: JobStore, redis: Redis) -> None:
    scores = TaskId(job=store.records.create(NewJob({}, "name", kind=JobKind.SCORES)).job_id, stage=Stage.MERGE)
    assert record_of(store, scores).kind is JobKind.SCORES
    assert store.tasks.succeed(claimed(store, scores), SCORES, "folder")
    assert record_of(store, scores).result == SCORES
    merge = new_job(store)
    assert redis.hdel(f"test:job:{merge.job}", "kind") == 1
    assert store.tasks.succeed(claimed(store, merge), RESULT, "folder")
    assert (record_of(store, merge).kind, record_of(store, merge).result) == (JobKind.MERGE, RESULT)


def as_the_last_release_kept_it(store: JobStore, redis: Redis, task: TaskId) -> None:
    """Writes a succeeded job's record anew as it was when a record held its result and there were no summaries."""
    result = redis.getdel(f"test:result:{task.job}")
    assert isinstance(result, str)
    assert redis.hdel(f"test:job:{task.job}", "summary", "priority", "bytes_to_write", "artifact_bytes") == 4
    assert redis.hset(f"test:job:{task.job}", "result", result) == 1
    assert sorted(redis.hkeys(f"test:job:{task.job}")) == [
        "artifact", "attempt", "created_ms", "finished_ms", "inputs", "kind", "labels", "name", "progress", "request",
        "result", "revision", "started_ms", "status", "tenant",
    ]  # fmt: skip


def test_records_of_the_last_release_are_read_listed_and_deleted(store: JobStore, redis: Redis, clock: Clock) -> None:
    merge = new_job(store, team="search")
    assert store.tasks.succeed(claimed(store, merge), SEARCHED, "folder")
    clock.advance(1)
    scores = TaskId(job=store.records.create(NewJob({}, "name", kind=JobKind.SCORES)).job_id, stage=Stage.MERGE)
    assert store.tasks.succeed(claimed(store, scores), SCORES, "folder")
    records = [record_of(store, task) for task in (merge, scores)]
    listed = list(store.records.newest())
    for task in (merge, scores):
        as_the_last_release_kept_it(store, redis, task)
    assert [record_of(store, task) for task in (merge, scores)] == records
    assert records[0].result == SEARCHED
    assert list(store.records.newest()) == listed
    in_short = MergeSummary.model_validate(RESULT.model_dump(exclude=LONG))
    assert [summary.result for summary in listed] == [SCORES, in_short]
    assert [summary.id for summary in store.records.newest(labels=[("team", "search")])] == [merge.job]
    assert store.records.delete(merge.job) is Deleted.DONE
    assert [key for key in redis.scan_iter("test:*") if merge.job in str(key)] == [f"test:gone:{merge.job}"]


def test_a_result_is_kept_beside_its_record_which_has_it_in_short(store: JobStore, redis: Redis) -> None:
    task = new_job(store)
    assert store.tasks.succeed(claimed(store, task), SEARCHED, "folder")
    kept = json.loads(str(redis.get(f"test:result:{task.job}")))
    assert kept == SEARCHED.model_dump(mode="json")
    summary = json.loads(str(redis.hget(f"test:job:{task.job}", "summary")))
    assert summary == {name: value for name, value in kept.items() if name not in LONG}
    assert "result" not in redis.hkeys(f"test:job:{task.job}")
    assert store.records.delete(task.job) is Deleted.DONE
    assert not redis.exists(f"test:result:{task.job}")


def test_scripts_change_what_belongs_to_a_job_through_one_function_alone() -> None:
    scripts = {path.stem: path.read_text() for path in FOLDER.glob("*.lua")}
    writes = re.compile(r"redis\.call\('(?!HGET|EXISTS)[A-Z]+', (job|result|events|progress_events)\b")
    assert {name for name, text in scripts.items() if writes.search(text)} == {"prelude"}
    changing = {"create", "claim", "renew", "finish", "release", "cancel", "retry", "time_out", "split", "finish_shard"}
    assert {name for name, text in scripts.items() if "change_job(" in text} == {"prelude", *changing}


def test_jobs_are_listed_by_status_and_labels_without_reading_what_is_long(store: JobStore, clock: Clock) -> None:
    tasks = []
    for number in range(5):
        tasks.append(new_job(store, int(number == 1), team="search", number=str(number % 2)))
        clock.advance(1)
    assert store.tasks.succeed(claimed(store, tasks[1]), SEARCHED, "folder")
    assert store.records.cancel(tasks[3].job) is Status.CANCELLED

    def listed(status: Status | None = None, *labels: tuple[str, str]) -> list[int]:
        found = store.records.newest(status=status, labels=labels)
        return [[task.job for task in tasks].index(summary.id) for summary in found]

    assert listed() == [4, 3, 2, 1, 0]
    assert listed(Status.QUEUED) == [4, 2, 0]
    assert listed(Status.SUCCEEDED) == [1]
    assert listed(None, ("number", "1")) == [3, 1]
    assert listed(Status.CANCELLED, ("team", "search"), ("number", "1")) == [3]
    assert listed(None, ("number", "0"), ("number", "1")) == listed(None, ("absent", "")) == []


def test_only_one_worker_claims_a_task(store: JobStore) -> None:
    task = new_job(store)
    first = store.tasks.claim("one")
    assert first is not None
    assert first.number == 1
    assert store.tasks.claim("two") is None
    assert record_of(store, task).status is Status.RUNNING
    assert waiting(store) == 0


def test_a_claim_that_was_not_answered_starts_the_same_attempt_when_it_is_sent_again(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = new_job(store, 1)
    later = new_job(store)
    monkeypatch.setattr("app.storage.tasks.secrets.token_hex", lambda count: "0" * 2 * count)
    first = claimed(store, task)
    before = record_of(store, task)
    assert store.tasks.claim("worker") == first
    assert record_of(store, task) == before
    monkeypatch.undo()
    assert claimed(store, later).number == 1
    assert store.tasks.claim("worker") is None


def test_a_lease_lasts_as_long_as_it_is_renewed(store: JobStore, clock: Clock) -> None:
    attempt = claimed(store, new_job(store))
    clock.advance(LEASE_S - 1)
    assert store.tasks.renew(attempt) is Status.RUNNING
    clock.advance(LEASE_S - 1)
    assert store.tasks.expired() == []
    clock.advance(1)
    assert store.tasks.expired() == [attempt]


def test_renewing_records_progress_and_changes_the_revision(store: JobStore) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    before = record_of(store, task).revision
    store.tasks.renew(attempt)
    assert record_of(store, task).revision == before
    store.tasks.renew(attempt, Progress(phase=PhaseName.SCORING, done=1, total=2, unit="examples", fraction=0.5))
    after = record_of(store, task)
    assert after.revision == before + 1
    assert after.progress.fraction == 0.5


Write = Callable[[JobStore, Attempt], object]
WRITES: dict[str, Write] = {
    "succeed": lambda store, attempt: store.tasks.succeed(attempt, RESULT, "folder"),
    "fail": lambda store, attempt: store.tasks.fail(attempt, FAILURE),
    "renew": lambda store, attempt: store.tasks.renew(attempt, Progress(fraction=0.9)),
    "release": lambda store, attempt: store.tasks.release(attempt, lost=False),
}


@pytest.mark.parametrize("write", WRITES)
def test_an_attempt_that_was_replaced_can_write_nothing(store: JobStore, clock: Clock, write: str) -> None:
    task = new_job(store)
    old = claimed(store, task)
    clock.advance(LEASE_S + 1)
    assert store.tasks.release(old, lost=True, only_expired=True)
    new = claimed(store, task)
    before = record_of(store, task)
    assert not WRITES[write](store, old)
    assert record_of(store, task) == before
    assert store.tasks.succeed(new, RESULT, "folder")


@pytest.mark.parametrize("write", [name for name in WRITES if name != "succeed"])
def test_a_job_ends_once(store: JobStore, write: str) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    assert store.tasks.succeed(attempt, RESULT, "folder")
    before = record_of(store, task)
    assert before.status is Status.SUCCEEDED
    assert before.artifact == "folder"
    assert before.progress.fraction == 1
    assert not WRITES[write](store, attempt)
    assert record_of(store, task) == before
    assert store.tasks.claim("another") is None


def test_ending_a_job_again_because_the_answer_got_lost_is_no_failure(store: JobStore) -> None:
    """Otherwise the worker would take its result for unwanted and remove it."""
    task = new_job(store)
    attempt = claimed(store, task)
    assert store.tasks.succeed(attempt, RESULT, "folder")
    before = record_of(store, task)
    assert store.tasks.succeed(attempt, RESULT, "folder")
    assert record_of(store, task) == before


def test_creating_a_job_again_because_the_answer_got_lost_changes_nothing(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.records.secrets.token_hex", lambda count: "0" * 2 * count)
    task = new_job(store)
    attempt = claimed(store, task)
    assert new_job(store) == task
    assert store.tasks.renew(attempt) is Status.RUNNING
    assert record_of(store, task).attempt == 1


def test_a_lease_renewed_in_time_is_not_released_by_the_reaper(store: JobStore, clock: Clock) -> None:
    attempt = claimed(store, new_job(store))
    clock.advance(LEASE_S + 1)
    assert store.tasks.expired() == [attempt]
    store.tasks.renew(attempt)
    assert not store.tasks.release(attempt, lost=True, only_expired=True)
    assert store.tasks.renew(attempt) is Status.RUNNING


def test_handing_back_counts_as_no_loss(store: JobStore) -> None:
    task = new_job(store)
    for number in range(1, 2 * MAX_LOSSES):
        attempt = claimed(store, task)
        assert attempt.number == number
        assert store.tasks.release(attempt, lost=False)
    assert record_of(store, task).status is Status.QUEUED


def test_a_job_that_loses_every_worker_fails_and_says_so(store: JobStore) -> None:
    task = new_job(store)
    for _ in range(MAX_LOSSES):
        assert record_of(store, task).status is Status.QUEUED
        assert store.tasks.release(claimed(store, task), lost=True)
    record = record_of(store, task)
    assert record.status is Status.FAILED
    assert record.error is not None
    assert record.error.code is ErrorCode.WORKER_LOST
    assert record.error.retryable
    assert record.finished_ms is not None
    assert store.tasks.expired() == []
    assert waiting(store) == 0


def test_an_idempotency_key_makes_one_job(store: JobStore) -> None:
    first = store.records.create(NewJob({}, "name"), Idempotency("key", "digest", 60))
    again = store.records.create(NewJob({}, "name"), Idempotency("key", "digest", 60))
    assert not first.existing
    assert (again.job_id, again.existing, again.same_body) == (first.job_id, True, True)
    other = store.records.create(NewJob({}, "name"), Idempotency("key", "another", 60))
    assert (other.existing, other.same_body) == (True, False)
    assert [record.id for record in store.records.newest()] == [first.job_id]
    assert store.records.remembered(DEFAULT_TENANT, Idempotency("key", "digest", 60)) == again
    assert store.records.remembered(DEFAULT_TENANT, Idempotency("no such key", "digest", 60)) is None


def test_jobs_are_listed_newest_first_across_pages(store: JobStore, clock: Clock) -> None:
    ids = []
    for _ in range(205):
        ids.append(new_job(store).job)
        clock.advance(0.001)
    assert [record.id for record in store.records.newest()] == ids[::-1]
    assert [record.id for record in store.records.newest(after=ids[200])] == ids[199::-1]


def test_live_workers_are_those_that_beat_lately(store: JobStore, clock: Clock) -> None:
    store.workers.beat("one", 10)
    clock.advance(6)
    store.workers.beat("two", 10)
    assert store.workers.count() == 2
    clock.advance(6)
    assert store.workers.count() == 1
    assert store.workers.names() == ["two"]
    store.workers.sign_off("two")
    assert store.workers.count() == 0


def test_the_reaper_puts_an_expired_attempt_back_in_the_queue(
    store: JobStore, queue: TaskQueue, redis: Redis, clock: Clock
) -> None:
    task = new_job(store)
    queue.wake()
    redis.lpop("rq:queue:test")  # as the worker that then dies
    claimed(store, task)
    clock.advance(LEASE_S + 1)
    Reaper(store, queue).sweep()
    assert record_of(store, task).status is Status.QUEUED
    assert redis.llen("rq:queue:test") == 1


def test_a_task_whose_message_was_lost_wakes_a_worker_again(store: JobStore, queue: TaskQueue, redis: Redis) -> None:
    new_job(store)
    assert queue.wake() == 1
    assert queue.wake() == 0  # RQ has the message, so the task only waits for a worker
    reaper = Reaper(store, queue)
    redis.delete("rq:queue:test")
    reaper.sweep()
    assert redis.llen("rq:queue:test") == 1
    reaper.sweep()
    assert redis.llen("rq:queue:test") == 1


def test_a_job_accepted_while_the_queue_was_away_wakes_a_worker_at_the_next_sweep(
    store: JobStore, queue: TaskQueue, redis: Redis
) -> None:
    new_job(store)
    Reaper(store, queue).sweep()
    assert redis.llen("rq:queue:test") == 1


def test_there_are_as_many_messages_as_tasks_that_may_start_and_workers(
    store: JobStore, queue: TaskQueue, redis: Redis
) -> None:
    for name in ("one", "two", "three"):
        store.workers.beat(name, 10)
    assert queue.wake() == 0
    for messages in (1, 2, 3, 3, 3):
        new_job(store)
        queue.wake()
        assert redis.llen("rq:queue:test") == messages


def test_the_states_form_a_closed_table() -> None:
    assert Status.SUCCEEDED.predecessors == {Status.RUNNING}
    assert Status.RUNNING.predecessors == {Status.QUEUED}
    assert all(status.predecessors or status is Status.QUEUED for status in Status)
    assert {status for status in Status if status.is_final} == {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}


def test_a_waiting_job_is_cancelled_at_once(store: JobStore) -> None:
    task = new_job(store)
    assert store.records.cancel(task.job) is Status.CANCELLED
    assert record_of(store, task).finished_ms is not None
    assert store.tasks.claim("worker") is None
    assert waiting(store) == 0


def test_a_running_job_is_asked_to_stop_and_its_attempt_says_when(store: JobStore) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    assert not store.tasks.acknowledge_cancel(attempt)
    assert store.records.cancel(task.job) is Status.CANCELLING
    assert store.records.cancel(task.job) is Status.CANCELLING
    assert store.tasks.renew(attempt) is Status.CANCELLING
    assert not store.tasks.succeed(attempt, RESULT, "folder")
    assert not store.tasks.fail(attempt, FAILURE)
    assert store.tasks.acknowledge_cancel(attempt)
    assert record_of(store, task).status is Status.CANCELLED
    assert store.records.cancel(task.job) is Status.CANCELLED


@pytest.mark.parametrize("lost", [True, False])
def test_a_job_that_loses_its_worker_while_it_is_cancelled_is_cancelled(
    store: JobStore, clock: Clock, lost: bool
) -> None:
    task = new_job(store)
    attempt = claimed(store, task)
    store.records.cancel(task.job)
    clock.advance(LEASE_S + 1)
    assert store.tasks.release(attempt, lost=lost)
    assert record_of(store, task).status is Status.CANCELLED
    assert waiting(store) == 0


def test_a_job_that_ended_cannot_be_cancelled(store: JobStore) -> None:
    succeeded, failed = new_job(store, 1), new_job(store)
    store.tasks.succeed(claimed(store, succeeded), RESULT, "folder")
    store.tasks.fail(claimed(store, failed), FAILURE)
    before = [record_of(store, task) for task in (succeeded, failed)]
    assert [store.records.cancel(task.job) for task in (succeeded, failed)] == [Status.SUCCEEDED, Status.FAILED]
    assert [record_of(store, task) for task in (succeeded, failed)] == before
    assert store.records.cancel("0" * 28) is None


def test_retrying_begins_a_new_attempt_with_a_clean_record(store: JobStore) -> None:
    task = new_job(store)
    for _ in range(MAX_LOSSES):
        store.tasks.release(claimed(store, task), lost=True)
    assert record_of(store, task).status is Status.FAILED
    assert store.records.retry(task.job)
    record = record_of(store, task)
    assert (record.status, record.error, record.finished_ms) == (Status.QUEUED, None, None)
    attempt = claimed(store, task)
    assert attempt.number == MAX_LOSSES + 1
    assert store.tasks.release(attempt, lost=True), "earlier losses do not count against the new run"
    assert record_of(store, task).status is Status.QUEUED


def test_only_failed_and_cancelled_jobs_are_retried(store: JobStore) -> None:
    task = new_job(store)
    assert not store.records.retry(task.job)
    attempt = claimed(store, task)
    assert not store.records.retry(task.job)
    store.records.cancel(task.job)
    assert not store.records.retry(task.job)
    store.tasks.acknowledge_cancel(attempt)
    assert store.records.retry(task.job)
    store.tasks.succeed(claimed(store, task), RESULT, "folder")
    assert not store.records.retry(task.job)
    assert not store.records.retry("0" * 28)


def test_only_jobs_that_ended_are_deleted_and_nothing_of_them_stays_but_that_they_were(
    store: JobStore, redis: Redis
) -> None:
    task = new_job(store)
    assert store.records.delete(task.job) is Deleted.NOT_ENDED
    attempt = claimed(store, task)
    assert store.records.delete(task.job) is Deleted.NOT_ENDED
    store.tasks.fail(attempt, FAILURE)
    assert store.records.gone(task.job) is None
    assert store.records.delete(task.job) is Deleted.DONE
    assert store.records.get(task.job) is None
    assert [key for key in redis.scan_iter("test:*") if task.job in str(key)] == [f"test:gone:{task.job}"]
    assert list(store.records.newest()) == []
    assert store.records.delete(task.job) is Deleted.NO_SUCH_JOB
    assert store.records.gone(task.job) is Gone.DELETED


def timed(store: JobStore, seconds: float, priority: int = 0) -> TaskId:
    job = NewJob({}, "name", deadline_seconds=seconds, priority=priority)
    return TaskId(job=store.records.create(job).job_id, stage=Stage.MERGE)


@pytest.mark.parametrize("runs", [False, True], ids=["waiting", "running"])
def test_a_job_past_its_deadline_fails_whether_it_waits_or_runs(store: JobStore, clock: Clock, runs: bool) -> None:
    task = timed(store, 5.5)
    attempt = claimed(store, task) if runs else None
    clock.advance(5.4)
    assert store.records.time_out() == 0
    clock.advance(0.1)
    assert store.records.time_out() == 1
    record = record_of(store, task)
    assert record.status is Status.FAILED
    assert record.error is not None
    assert (record.error.code, record.error.retryable) == (ErrorCode.TIMEOUT, True)
    assert "deadline_seconds, 5.5" in record.error.message
    assert record.finished_ms == clock.now
    assert store.records.time_out() == 0
    assert (waiting(store), store.tasks.expired()) == (0, [])
    if attempt is not None:  # the worker hears of it, and nothing that it does counts
        assert store.tasks.renew(attempt) is None
        assert not store.tasks.succeed(attempt, RESULT, "folder")
        assert not store.tasks.release(attempt, lost=True)
        assert record_of(store, task) == record


def test_all_attempts_share_a_deadline_and_a_retry_has_as_long_again(store: JobStore, clock: Clock) -> None:
    task = timed(store, 10)
    clock.advance(4)
    store.tasks.release(claimed(store, task), lost=True)
    clock.advance(4)
    store.tasks.release(claimed(store, task), lost=False)
    clock.advance(2)
    assert store.records.time_out() == 1
    assert store.records.retry(task.job)
    clock.advance(9)
    assert store.records.time_out() == 0
    assert store.tasks.succeed(claimed(store, task), RESULT, "folder")
    clock.advance(100)
    assert store.records.time_out() == 0
    assert record_of(store, task).status is Status.SUCCEEDED


def test_past_the_deadline_nothing_begins_and_nothing_succeeds_before_anybody_has_ended_the_job(
    store: JobStore, clock: Clock
) -> None:
    late, running = timed(store, 10), timed(store, 10, 1)
    attempt = claimed(store, running)
    clock.advance(10)
    assert store.tasks.claim("worker") is None
    assert not store.tasks.succeed(attempt, RESULT, "folder")
    assert record_of(store, running).status is Status.RUNNING
    assert store.records.time_out() == 2
    assert not [task for task in (late, running) if record_of(store, task).status is not Status.FAILED]


def test_a_job_that_is_being_cancelled_or_has_ended_has_no_deadline(
    store: JobStore, clock: Clock, redis: Redis
) -> None:
    cancelled, cancelling, failed, lost = [timed(store, 10, -place) for place in range(4)]
    store.records.cancel(cancelled.job)
    attempt = claimed(store, cancelling)
    store.records.cancel(cancelling.job)
    store.tasks.fail(claimed(store, failed), FAILURE)
    for _ in range(MAX_LOSSES):
        store.tasks.release(claimed(store, lost), lost=True)
    assert redis.zcard("test:deadlines") == 0
    clock.advance(100)
    assert store.records.time_out() == 0
    assert store.tasks.acknowledge_cancel(attempt)


RETENTION_S = 1000.0


@pytest.fixture
def forgetting(redis: Redis, clock: Clock) -> JobStore:
    return JobStore(redis, "test", LEASE_S, MAX_LOSSES, clock, RETENTION_S)


def ended(store: JobStore) -> TaskId:
    task = new_job(store)
    assert store.tasks.succeed(claimed(store, task), RESULT, f"{task.job}.1")
    return task


def test_a_job_is_kept_for_its_time_after_its_end_and_no_longer(forgetting: JobStore, clock: Clock) -> None:
    waits = new_job(forgetting)
    failed = new_job(forgetting, 1)
    clock.advance(RETENTION_S)
    forgetting.tasks.fail(claimed(forgetting, failed), FAILURE)
    record = record_of(forgetting, failed)
    assert record.expires_ms == clock.now + RETENTION_S * 1000
    clock.advance(RETENTION_S - 1)
    assert list(forgetting.records.outlived()) == []
    clock.advance(1)
    assert [found.id for found in forgetting.records.outlived()] == [failed.job]
    assert forgetting.records.expire(record)
    assert not forgetting.records.expire(record)
    assert (forgetting.records.get(failed.job), forgetting.records.gone(failed.job)) == (None, Gone.EXPIRED)
    assert record_of(forgetting, waits).expires_ms is None


def test_a_job_that_is_tried_again_meanwhile_does_not_expire(forgetting: JobStore, clock: Clock) -> None:
    task = new_job(forgetting)
    forgetting.tasks.fail(claimed(forgetting, task), FAILURE)
    clock.advance(RETENTION_S)
    [record] = forgetting.records.outlived()
    forgetting.records.retry(task.job)
    assert not forgetting.records.expire(record)
    forgetting.tasks.fail(claimed(forgetting, task), FAILURE)
    assert not forgetting.records.expire(record)
    assert list(forgetting.records.outlived()) == []


def test_sweeps_at_their_usual_pace_release_what_has_the_shortest_lease(
    redis: Redis, queue: TaskQueue, clock: Clock
) -> None:
    store = JobStore(redis, "test", 2, MAX_LOSSES, clock)
    attempt = claimed(store, new_job(store))
    reaper = Reaper(store, queue, lambda: clock.now / 1000)
    for _ in range(2):
        reaper.sweep()
        clock.advance(SWEEP_S)
    assert not store.tasks.attempt_is_current(attempt.task, attempt.number)


@pytest.mark.parametrize("runs", [False, True], ids=["waiting", "running"])
def test_a_job_whose_models_are_read_by_an_active_one_is_kept_until_that_ends(
    forgetting: JobStore, clock: Clock, runs: bool
) -> None:
    read, other = ended(forgetting), ended(forgetting)
    request = {"models": [{"checkpoint": f"job:{read.job}/a"}, {"checkpoint": "local:b"}]}
    reading = TaskId(job=forgetting.records.create(NewJob(request, "chain")).job_id, stage=Stage.MERGE)
    attempt = claimed(forgetting, reading) if runs else None
    clock.advance(RETENTION_S)
    assert [record.id for record in forgetting.records.outlived()] == [other.job]
    forgetting.tasks.fail(attempt or claimed(forgetting, reading), FAILURE)
    assert {record.id for record in forgetting.records.outlived()} == {read.job, other.job}


def test_many_outlived_jobs_are_found_page_by_page_while_they_are_removed(forgetting: JobStore, clock: Clock) -> None:
    jobs = [ended(forgetting) for _ in range(105)]
    clock.advance(RETENTION_S)
    removed = [record.id for record in forgetting.records.outlived() if forgetting.records.expire(record)]
    assert sorted(removed) == sorted(task.job for task in jobs)
    assert list(forgetting.records.newest()) == []


def test_without_a_retention_nothing_expires(store: JobStore, clock: Clock) -> None:
    task = ended(store)
    clock.advance(10_000_000)
    assert list(store.records.outlived()) == []
    assert record_of(store, task).expires_ms is None


def test_after_a_time_without_redis_leases_can_be_renewed_before_they_are_taken_for_lost(
    store: JobStore, queue: TaskQueue, clock: Clock
) -> None:
    attempt = claimed(store, new_job(store))
    reaper = Reaper(store, queue, lambda: clock.now / 1000)
    reaper.sweep()
    clock.advance(LEASE_S * 3)  # no sweep came through
    reaper.sweep()
    assert store.tasks.attempt_is_current(attempt.task, attempt.number)
    for _ in range(4):
        clock.advance(LEASE_S / 4)
        reaper.sweep()
    assert not store.tasks.attempt_is_current(attempt.task, attempt.number)
