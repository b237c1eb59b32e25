"""A job's shards in a real Redis, with a clock that the test moves."""

import json
from collections.abc import Callable

import pytest
from redis import Redis

from app.contracts.jobs import (
    Attempt,
    ErrorCode,
    JobError,
    ModelProgress,
    PhaseName,
    Progress,
    Record,
    Stage,
    Status,
    TaskId,
)
from app.contracts.limits import Limits, QueueFull, TenantLimits
from app.storage.jobs import JobStore
from app.storage.records import Deleted, NewJob
from app.storage.tasks import CutScoring, NewShard, RunningTask, ScoringPhase, TasksOfJob
from tests.conftest import RESULT

LEASE_S = 10
MAX_LOSSES = 3
FAILURE = JobError(code=ErrorCode.INTERNAL, message="broken")
ROWS = 100


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


NewStore = Callable[..., JobStore]


@pytest.fixture
def new_store(redis: Redis, clock: Clock) -> NewStore:
    return lambda **options: JobStore(redis, "fan", LEASE_S, MAX_LOSSES, clock, **options)


@pytest.fixture
def store(new_store: NewStore) -> JobStore:
    return new_store()


def cut(*models: str, done: int = 0) -> CutScoring:
    """A shard of so many rows for each model that is named, once or more."""
    phase = ScoringPhase(start=0.1, span=0.8, total=ROWS * len(models) + done, least=0.02)
    shards = [
        NewShard(model, ROWS, f"local:{model}", json.dumps({"model": model, "n": n})) for n, model in enumerate(models)
    ]
    totals = {model: ROWS * models.count(model) for model in models}
    of = {model: ModelProgress(done=done, total=total + done) for model, total in totals.items()}
    return CutScoring(shards, phase, of, {"address": 1024})


def claim(store: JobStore, worker: str = "worker", holds: str = "") -> Attempt:
    attempt = store.tasks.claim(worker, holds)
    assert attempt is not None
    return attempt


def split(store: JobStore, *models: str, done: int = 0, deadline: float | None = None) -> Attempt:
    """A new job that was split, and its attempt of before."""
    store.records.create(NewJob({"some": "request"}, "name", deadline_seconds=deadline))
    attempt = claim(store)
    assert store.tasks.split(attempt, cut(*models, done=done))
    return attempt


def record_of(store: JobStore, attempt: Attempt) -> Record:
    record = store.records.get(attempt.task.job)
    assert record is not None
    return record


def finish(store: JobStore, shard: Attempt, seconds: float = 2.0) -> bool:
    return store.tasks.finish_shard(shard, "a", seconds, ROWS)


def test_shards_take_the_place_of_their_job_and_the_last_one_lets_it_go_on(store: JobStore, clock: Clock) -> None:
    before = split(store, "a", "a", "b")
    record = record_of(store, before)
    assert (record.status, record.attempt) == (Status.RUNNING, 1)
    shards = [claim(store) for _ in range(3)]
    assert {str(shard.task) for shard in shards} == {f"{before.task.job}-score-{n}" for n in range(3)}
    assert store.tasks.claim("worker") is None  # the job itself waits for them
    works = {json.loads(store.tasks.work_of_shard(shard) or "")["n"] for shard in shards}
    assert works == {0, 1, 2}
    clock.advance(3)
    assert all(finish(store, shard) for shard in shards[:2])
    assert store.tasks.claim("worker") is None
    assert finish(store, shards[2])
    after = claim(store)
    assert (after.task, after.number) == (before.task, 2)
    done = store.tasks.shards_done(after)
    assert (done.goes_on, done.elapsed_seconds, done.batch_tokens) == (True, 3.0, {"address": 1024})
    assert done.seconds == {"a": 6.0}
    record = record_of(store, before)
    assert (record.status, record.attempt) == (Status.RUNNING, 1)  # the work was started once
    assert store.tasks.succeed(after, RESULT, "folder")
    assert record_of(store, before).status is Status.SUCCEEDED
    assert store.tasks.counts() == []


def test_shards_and_the_merge_after_them_are_for_workers_with_the_jobs_device(store: JobStore) -> None:
    store.records.create(NewJob({}, "name", device="cuda"))
    before = store.tasks.claim("gpu", device="cuda")
    assert before is not None
    assert store.tasks.split(before, cut("a", "b"))
    store.records.create(NewJob({}, "another"))
    assert not claim(store).is_of_shard
    assert store.tasks.claim("worker") is None
    shards = [store.tasks.claim("gpu", holds, "cuda") for holds in ("local:b", "")]
    held = [shard and store.tasks.work_of_shard(shard) for shard in shards]
    assert [json.loads(work or "")["model"] for work in held] == ["b", "a"]
    assert all(shard and finish(store, shard) for shard in shards)
    assert store.tasks.claim("worker") is None
    after = store.tasks.claim("gpu", device="cuda")
    assert after is not None
    assert (after.task, after.number) == (before.task, 2)
    assert store.tasks.fail(after, FAILURE)
    assert store.records.retry(after.task.job)
    assert store.tasks.claim("worker") is None
    assert store.tasks.claim("gpu", device="cuda") is not None


def test_what_is_told_twice_counts_once(store: JobStore) -> None:
    before = split(store, "a", "a")
    assert store.tasks.split(before, cut("a", "a"))  # its answer got lost
    first, second = claim(store), claim(store)
    assert finish(store, first)
    assert finish(store, first)
    assert store.tasks.claim("worker") is None
    assert finish(store, second)
    assert finish(store, second)
    after = claim(store)
    assert store.tasks.shards_done(after).seconds == {"a": 4.0}
    assert not store.tasks.split(Attempt(task=before.task, number=7), cut("a", "a"))


def test_a_shard_that_loses_its_worker_is_made_by_another_and_the_rest_goes_on(store: JobStore, clock: Clock) -> None:
    before = split(store, "a", "a")
    lost, other = claim(store), claim(store)
    clock.advance(LEASE_S - 1)
    assert store.tasks.renew(other) is Status.RUNNING
    clock.advance(2)
    assert store.tasks.expired() == [lost]
    assert store.tasks.release(lost, lost=True, only_expired=True)
    assert record_of(store, before).status is Status.RUNNING
    assert store.tasks.renew(other) is Status.RUNNING
    again = claim(store)
    assert (again.task, again.number) == (lost.task, 2)
    assert not finish(store, lost)
    assert finish(store, again)
    assert finish(store, other)
    assert claim(store).task == before.task


def test_a_shard_that_takes_every_worker_down_fails_its_job_and_stops_the_others(store: JobStore) -> None:
    before = split(store, "a", "a", "a")
    other, poisoned = claim(store), claim(store)
    for _ in range(MAX_LOSSES):
        assert store.tasks.release(poisoned, lost=True)
        if record_of(store, before).status is Status.FAILED:
            break
        poisoned = claim(store)
    record = record_of(store, before)
    assert record.error is not None
    assert record.error.code is ErrorCode.WORKER_LOST
    assert store.tasks.renew(other) is None  # its worker gives it up
    assert not finish(store, other)
    assert store.tasks.claim("worker") is None
    assert store.tasks.counts() == []


def test_an_error_of_one_shard_is_the_jobs_and_a_retry_makes_shards_anew(store: JobStore) -> None:
    before = split(store, "a", "b")
    failing, other = claim(store), claim(store)
    assert store.tasks.fail(failing, FAILURE)
    record = record_of(store, before)
    assert (record.status, record.error) == (Status.FAILED, FAILURE)
    assert store.tasks.renew(other) is None
    assert store.tasks.claim("worker") is None
    assert store.records.retry(before.task.job)
    again = claim(store)
    assert (again.task, record_of(store, before).attempt) == (before.task, 2)
    assert not store.tasks.shards_done(again).goes_on
    assert store.tasks.shards_done(again).batch_tokens == {"address": 1024}  # chosen once for the job
    assert store.tasks.split(again, cut("b"))
    shard = claim(store)
    assert not finish(store, Attempt(task=shard.task, number=shard.number - 1))  # of a worker of before the retry
    assert finish(store, shard)
    assert store.tasks.shards_done(claim(store)).goes_on


def test_a_job_is_cancelled_when_the_last_of_its_shards_has_stopped(store: JobStore) -> None:
    before = split(store, "a", "a", "a")
    shards = [claim(store), claim(store)]
    assert store.records.cancel(before.task.job) is Status.CANCELLING
    assert store.tasks.claim("worker") is None  # nothing of it begins any more
    assert [store.tasks.renew(shard) for shard in shards] == [Status.CANCELLING] * 2
    assert store.tasks.acknowledge_cancel(shards[0])
    assert record_of(store, before).status is Status.CANCELLING
    assert not finish(store, shards[1])
    assert store.tasks.release(shards[1], lost=True)
    assert record_of(store, before).status is Status.CANCELLED
    assert store.tasks.counts() == []


def test_a_split_job_of_which_nothing_runs_is_cancelled_at_once(store: JobStore) -> None:
    before = split(store, "a", "a")
    assert store.records.cancel(before.task.job) is Status.CANCELLED
    assert store.tasks.counts() == []
    assert store.records.delete(before.task.job) is Deleted.DONE


def test_a_job_that_is_cancelled_before_it_can_be_split_is_not(store: JobStore) -> None:
    task = TaskId(job=store.records.create(NewJob({}, "name")).job_id, stage=Stage.MERGE)
    attempt = claim(store)
    assert store.records.cancel(task.job) is Status.CANCELLING
    assert not store.tasks.split(attempt, cut("a", "a"))
    assert store.tasks.acknowledge_cancel(attempt)
    assert store.tasks.claim("worker") is None


def test_shards_end_with_the_deadline_of_their_job(store: JobStore, clock: Clock) -> None:
    before = split(store, "a", "a", deadline=60)
    shard = claim(store)
    clock.advance(61)
    assert store.tasks.claim("worker") is None
    assert store.records.time_out() == 1
    record = record_of(store, before)
    assert record.error is not None
    assert record.error.code is ErrorCode.TIMEOUT
    assert store.tasks.renew(shard) is None
    assert store.tasks.counts() == []


def test_progress_of_shards_adds_up_and_its_fraction_never_falls(store: JobStore, clock: Clock) -> None:
    before = split(store, "a", "a", done=50)
    first, second = claim(store), claim(store)
    clock.advance(10)

    def renew(shard: Attempt, rows: int) -> Progress:
        progress = Progress(phase=PhaseName.SCORING, done=rows, total=ROWS, unit="examples", fraction=0.9)
        assert store.tasks.renew(shard, progress) is Status.RUNNING
        return record_of(store, before).progress

    progress = renew(first, 20)
    assert (progress.phase, progress.done, progress.total, progress.unit) == ("scoring", 70, 250, "examples")
    assert progress.fraction == pytest.approx(0.1 + 0.8 * 70 / 250, abs=1e-4)
    assert progress.eta_seconds == pytest.approx(10 / progress.fraction - 10, abs=0.2)
    assert renew(second, 40).done == 110
    assert renew(first, 60).done == 150
    reached = record_of(store, before).progress.fraction
    assert store.tasks.release(first, lost=True)
    progress = record_of(store, before).progress
    assert (progress.done, progress.fraction) == (90, reached)  # its rows are to be gone through again
    assert finish(store, second)
    assert record_of(store, before).progress.done == 150


def test_a_job_tells_how_far_each_model_is_and_which_worker_is_at_what(store: JobStore) -> None:
    store.records.create(NewJob({}, "waiting"))
    before = claim(store, "first")
    assert store.tasks.of_job(before.task.job) == TasksOfJob([RunningTask("first")], 0)
    assert store.tasks.split(before, cut("a", "a", "b", "b", done=50))
    shards = {store.tasks.work_of_shard(shard): shard for shard in (claim(store, f"w{n}") for n in range(3))}
    of_a, *_ = (shard for work, shard in shards.items() if json.loads(work or "")["model"] == "a")
    assert store.tasks.renew(of_a, Progress(phase=PhaseName.SCORING, done=30)) is Status.RUNNING
    found = store.tasks.of_job(before.task.job)
    assert found.waiting_shards == 1
    assert sorted((task.worker, task.model, task.total) for task in found.running)[0][0] == "w0"
    assert [task.done for task in found.running if task.model == "a"] == [30]
    told = record_of(store, before).progress
    assert {name: (of.done, of.total) for name, of in told.models.items()} == {"a": (80, 250), "b": (50, 250)}
    assert store.tasks.release(of_a, lost=True)
    assert record_of(store, before).progress.models["a"].done == 50
    assert len(store.tasks.of_job(before.task.job).running) == 2


def test_a_worker_prefers_shards_of_the_checkpoint_that_it_holds(store: JobStore) -> None:
    split(store, "a", "a", "b", "b", "c")
    taken = [claim(store, holds=holds).task.shard for holds in ("local:b", "local:a", "local:b", "local:x")]
    assert taken == [2, 0, 3, 4]  # who holds none of them begins at the other end
    assert claim(store, holds="local:b").task.shard == 1


def test_limits_count_running_shards_as_tasks_and_waiting_ones_not_as_jobs(new_store: NewStore, clock: Clock) -> None:
    store = new_store(limits=TenantLimits(Limits(active_jobs=2, queued_jobs=1)))
    split(store, "a", "a", "a")
    shard = claim(store)
    claim(store)
    assert store.tasks.claim("worker") is None  # two run
    clock.advance(1)  # of jobs of one millisecond either may be first
    other = NewJob({}, "other")
    store.records.require_place("default")
    store.records.create(other)
    with pytest.raises(QueueFull):
        store.records.create(other)
    assert finish(store, shard)
    assert claim(store).task.stage is Stage.SCORE


def test_bytes_are_reserved_once_until_the_job_ends(store: JobStore, redis: Redis) -> None:
    store.records.create(NewJob({}, "name", bytes_to_write=1000))
    attempt = claim(store)
    assert store.tasks.split(attempt, cut("a", "a"))
    shards = [claim(store), claim(store)]
    assert redis.hget("fan:reserved", "default") == "1000"
    assert all(finish(store, shard) for shard in shards)
    assert redis.hget("fan:reserved", "default") == "1000"
    assert store.tasks.succeed(claim(store), RESULT, "folder")
    assert redis.hget("fan:reserved", "default") == "0"
    assert redis.hget("fan:shards", "default") == "0"


def test_nothing_stays_of_the_shards_of_a_job_that_is_deleted(store: JobStore, redis: Redis) -> None:
    before = split(store, "a", "a")
    assert store.records.cancel(before.task.job) is Status.CANCELLED
    assert len(list(redis.scan_iter("fan:task:*"))) == 3
    assert store.records.delete(before.task.job) is Deleted.DONE
    assert list(redis.scan_iter("fan:task:*")) == []


def test_a_thousand_shards_are_stopped_soon_and_end_once(store: JobStore) -> None:
    before = split(store, *["a"] * 1000)
    shard = claim(store)
    assert store.tasks.fail(shard, FAILURE)
    assert store.tasks.counts() == []
    assert record_of(store, before).status is Status.FAILED
