"""Who goes first: priorities and turns of tenants, at the size of a busy service, on a real Redis."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from redis import Redis

from app.contracts.devices import Device
from app.contracts.jobs import Attempt, Status, TaskId
from app.contracts.limits import UNLIMITED, Limits, QueueFull, TenantLimits
from app.storage.connection import connect_for_rq
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.reaper import Reaper
from app.storage.records import NewJob
from app.storage.scripts import TURN_EVERY
from app.storage.tasks import TenantTasks
from tests.conftest import RESULT

LEASE_S = 10


class Clock:
    """A clock that moves by a millisecond whenever it is read, so that no two jobs are of the same age."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


NewStore = Callable[..., JobStore]


@pytest.fixture
def new_store(redis: Redis, clock: Clock) -> NewStore:
    def make(limits: TenantLimits = UNLIMITED) -> JobStore:
        return JobStore(redis, "queue", LEASE_S, 3, clock, limits=limits)

    return make


@pytest.fixture
def store(new_store: NewStore) -> JobStore:
    return new_store()


def wait(store: JobStore, tenant: str, priority: int = 0, device: Device | None = None) -> str:
    """The id of a new job that waits."""
    return store.records.create(NewJob({}, "name", tenant=tenant, priority=priority, device=device)).job_id


def begin(store: JobStore) -> Attempt:
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    return attempt


def tenant_of(store: JobStore, attempt: Attempt) -> str:
    record = store.records.get(attempt.task.job)
    assert record is not None
    return record.tenant


def started(store: JobStore, count: int, *, end: bool = True) -> list[str]:
    """The tenants of so many jobs in the order in which they start, each after the end of the one before."""
    tenants = []
    for _ in range(count):
        attempt = begin(store)
        tenants.append(tenant_of(store, attempt))
        assert not end or store.tasks.succeed(attempt, RESULT, "folder")
    return tenants


def order_of(store: JobStore, jobs: Sequence[str]) -> list[int]:
    """The places of all jobs, in the order in which they start."""
    return [jobs.index(begin(store).task.job) for _ in jobs]


def test_a_tenants_jobs_start_by_priority_and_the_oldest_first_among_equal_ones(store: JobStore) -> None:
    jobs = [wait(store, "one", priority) for priority in (0, -10, 10, 0, 9, 10)]
    assert order_of(store, jobs) == [2, 5, 4, 0, 3, 1]
    assert store.tasks.claim("worker") is None


def test_a_job_shows_its_priority_and_records_of_the_last_release_count_as_zero(store: JobStore, redis: Redis) -> None:
    jobs = [wait(store, "one", priority) for priority in (-1, 3, 1)]
    assert redis.hdel(f"queue:job:{jobs[1]}", "priority") == 1
    shown = {summary.id: summary.priority for summary in store.records.newest(tenant="one")}
    assert [shown[job] for job in jobs] == [-1, 0, 1]
    record = store.records.get(jobs[2])
    assert record is not None
    assert record.public().priority == 1


def test_tenants_take_turns_however_many_jobs_one_of_them_has(store: JobStore) -> None:
    for _ in range(20):
        wait(store, "many")
    for _ in range(3):
        wait(store, "few")
        wait(store, "some")
    tenants = started(store, 9)
    for first in range(0, 9, 3):
        assert sorted(tenants[first : first + 3]) == ["few", "many", "some"]
    assert set(started(store, 14)) == {"many"}


def test_who_has_the_fewest_running_comes_first(store: JobStore) -> None:
    for _ in range(4):
        wait(store, "one")
    assert started(store, 2, end=False) == ["one", "one"]
    for _ in range(3):
        wait(store, "two")
    assert started(store, 4, end=False) == ["two", "two", "one", "two"]


def test_a_higher_priority_goes_first_and_yet_starves_no_tenant(store: JobStore) -> None:
    for _ in range(40):
        wait(store, "loud", 10)
        wait(store, "quiet")
    tenants = started(store, 40)
    assert Counter(tenants) == {"loud": 30, "quiet": 10}
    for first in range(0, 40, TURN_EVERY):
        assert "quiet" in tenants[first : first + TURN_EVERY]


def test_a_tenant_that_runs_as_many_as_it_may_waits_and_others_pass(new_store: NewStore) -> None:
    limits = TenantLimits(Limits(active_jobs=2), {"large": Limits(active_jobs=3), "free": Limits()})
    store = new_store(limits)
    for tenant in ("small", "large", "free"):
        for _ in range(5):
            wait(store, tenant, 5 if tenant == "small" else 0)
    running = [begin(store) for _ in range(10)]
    assert Counter(tenant_of(store, attempt) for attempt in running) == {"small": 2, "large": 3, "free": 5}
    assert store.tasks.claim("worker") is None
    assert store.tasks.startable(10) == 0, "no worker is woken for what may not start"
    ended = next(attempt for attempt in running if tenant_of(store, attempt) == "small")
    assert store.tasks.succeed(ended, RESULT, "folder")
    assert store.tasks.startable(10) > 0
    assert tenant_of(store, begin(store)) == "small"
    assert store.tasks.claim("worker") is None


@pytest.mark.parametrize("how", ["cancelled", "timed out", "lost", "handed back", "failed for good"])
def test_whatever_ends_an_attempt_another_of_the_tenant_may_run(
    new_store: NewStore, clock: Clock, redis: Redis, how: str
) -> None:
    store = new_store(TenantLimits(Limits(active_jobs=1)))
    job = NewJob({}, "name", tenant="one", priority=1, deadline_seconds=100)
    first = store.records.create(job).job_id
    wait(store, "one")
    attempt = begin(store)
    assert attempt.task.job == first
    assert store.tasks.claim("worker") is None
    if how == "cancelled":
        assert store.records.cancel(first) is Status.CANCELLING
        assert store.tasks.acknowledge_cancel(attempt)
    elif how == "timed out":
        clock.now += 100_000
        assert store.records.time_out() == 1
    elif how == "lost":
        clock.now += 1000 * LEASE_S
        assert store.tasks.release(attempt, lost=True, only_expired=True)
    elif how == "handed back":
        assert store.tasks.release(attempt, lost=False)
    else:
        for _ in range(2):
            assert store.tasks.release(attempt, lost=True)
            attempt = begin(store)
        assert store.tasks.release(attempt, lost=True)
    goes_on = how in ("lost", "handed back")
    assert (begin(store).task.job == first) is goes_on
    assert store.tasks.claim("worker") is None
    assert redis.zcard("queue:running:one") == 1


def test_a_limit_that_is_raised_counts_from_the_next_change(new_store: NewStore) -> None:
    low, high = new_store(TenantLimits(Limits(active_jobs=1))), new_store(TenantLimits(Limits(active_jobs=2)))
    for _ in range(3):
        wait(low, "one")
    running = begin(low)
    assert low.tasks.claim("worker") is None
    assert low.tasks.succeed(running, RESULT, "folder")
    assert [begin(high).task.job, begin(high).task.job]
    assert high.tasks.claim("worker") is None


def test_tasks_that_the_last_release_made_to_wait_are_taken_over(
    store: JobStore, redis: Redis, redis_url: str, clock: Clock
) -> None:
    jobs = [wait(store, tenant) for tenant in ("one", "two", "one")]
    tasks = [name for tenant in ("one", "two") for name in redis.zrange(f"queue:waiting:{tenant}", 0, -1)]
    redis.delete(*(f"queue:{name}" for name in ("waiting:one", "waiting:two", "turns", "ranks", "tenants")))
    for job in jobs:
        redis.hdel(f"queue:job:{job}", "priority")
    redis.hdel(f"queue:job:{jobs[1]}", "tenant")  # there were no tenants once
    redis.zadd("queue:due", dict.fromkeys(map(str, tasks), clock.now))
    assert store.tasks.claim("worker") is None
    queue = TaskQueue(connect_for_rq(redis_url), "queue", store)
    Reaper(store, queue).sweep()
    assert redis.llen("rq:queue:queue") == 1
    assert not redis.exists("queue:due")
    assert sorted(begin(store).task.job for _ in jobs) == sorted(jobs)
    assert {tenant.tenant for tenant in store.tasks.counts()} == {"one", "default"}


def test_a_task_that_a_worker_of_the_last_release_took_is_not_started_twice(store: JobStore, redis: Redis) -> None:
    job, other = wait(store, "one", 1), wait(store, "one")
    redis.hset(f"queue:task:{job}-merge-0", "state", "running")  # as its claim did
    assert begin(store).task.job == other
    assert store.tasks.claim("worker") is None


def test_counts_tell_how_many_wait_and_run_and_since_when(store: JobStore, clock: Clock) -> None:
    assert store.tasks.counts() == []
    made = []
    for priority in (3, -2, 5):
        made.append(clock.now + 1)
        wait(store, "one", priority)
    attempt = begin(store)
    began = clock.now
    made.append(clock.now + 1)
    wait(store, "two")
    one, two = sorted(store.tasks.counts(), key=lambda tenant: tenant.tenant)
    assert one == TenantTasks("one", {"any": 2, "cpu": 0, "cuda": 0}, made[0], 1, began)
    assert two == TenantTasks("two", {"any": 1, "cpu": 0, "cuda": 0}, made[3], 0, None)
    assert store.tasks.succeed(attempt, RESULT, "folder")
    made.append(clock.now + 1)
    wait(store, "two", 7, "cuda")
    one, two = sorted(store.tasks.counts(), key=lambda tenant: tenant.tenant)
    assert one == TenantTasks("one", {"any": 2, "cpu": 0, "cuda": 0}, made[0], 0, None)
    assert two == TenantTasks("two", {"any": 1, "cpu": 0, "cuda": 1}, made[3], 0, None)
    assert (two.waiting, len(store.active.jobs_read())) == (2, 0)


def test_a_job_is_claimed_by_workers_with_its_device_alone(store: JobStore) -> None:
    jobs: dict[Device | None, str] = {device: wait(store, "one", device=device) for device in (None, "cpu", "cuda")}
    urgent = wait(store, "two", 10, "cuda")
    on_cpu = [store.tasks.claim("worker") for _ in range(3)]
    assert [claim and claim.task.job for claim in on_cpu] == [jobs[None], jobs["cpu"], None]
    waiting = [store.tasks.claim("gpu", device="cuda") for _ in range(3)]
    assert [claim and claim.task.job for claim in waiting] == [urgent, jobs["cuda"], None]
    again = waiting[1]
    assert again is not None
    assert store.tasks.release(again, lost=True)
    assert store.tasks.claim("worker") is None  # a lost attempt waits in its lane
    claim = store.tasks.claim("gpu", device="cuda")
    assert claim is not None
    assert claim.task == again.task


def test_lanes_change_nothing_of_the_order_in_which_a_worker_takes_its_tasks(redis: Redis, clock: Clock) -> None:
    """The same jobs in two queues, in one of which some ask for the device that all workers have."""
    limits = TenantLimits(UNLIMITED.default, {"few": Limits(active_jobs=2)})
    plain, mixed = (JobStore(redis, prefix, LEASE_S, 3, clock, limits=limits) for prefix in ("plain", "mixed"))
    draw = Random(7)
    names: dict[str, int] = {}
    running: list[tuple[Attempt, Attempt]] = []
    taken: tuple[list[int | None], list[int | None]] = [], []
    for step in range(300):
        if draw.random() < 0.6:
            tenant, priority = draw.choice(["few", "one", "two"]), draw.choice([0, 0, -3, 5])
            names[wait(plain, tenant, priority)] = step
            names[wait(mixed, tenant, priority, draw.choice([None, "cpu"]))] = step
        elif running and draw.random() < 0.4:
            one, other = running.pop(draw.randrange(len(running)))
            assert plain.tasks.succeed(one, RESULT, "folder")
            assert mixed.tasks.succeed(other, RESULT, "folder")
        else:
            claims = plain.tasks.claim("worker"), mixed.tasks.claim("worker")
            for claim, told in zip(claims, taken, strict=True):
                told.append(None if claim is None else names[claim.task.job])
            if claims[0] and claims[1]:
                running.append((claims[0], claims[1]))
    assert sum(step is not None for step in taken[0]) > 40
    assert taken[0] == taken[1]


def test_each_lane_has_messages_for_the_workers_that_may_do_its_tasks(
    store: JobStore, redis: Redis, redis_url: str
) -> None:
    devices: dict[str, Device] = {"one": "cpu", "two": "cpu", "three": "cuda"}
    for name, device in devices.items():
        store.workers.beat(name, 60, device)
    queue = TaskQueue(connect_for_rq(redis_url), "lanes", store)
    for _ in range(4):
        wait(store, "one", device="cuda")
    assert queue.wake() == 1
    for _ in range(4):
        wait(store, "one")
        wait(store, "one", device="cpu")
    assert (queue.wake(), queue.wake()) == (5, 0)
    assert [redis.llen(f"rq:queue:lanes{of}") for of in ("", "-cpu", "-cuda")] == [3, 2, 1]


def test_workers_announce_their_device_and_a_lacking_one_is_said(store: JobStore) -> None:
    assert store.workers.lacking_for(None) == "a worker; none is alive"
    assert store.workers.lacking_for("cuda") == "a worker with the device cuda; none is alive"
    store.workers.beat("one", 60, "cpu")
    assert (store.workers.lacking_for(None), store.workers.lacking_for("cpu")) == (None, None)
    assert store.workers.lacking_for("cuda") == "a worker with the device cuda; none has it"
    store.workers.sign_off("one")
    assert (store.workers.count("cpu"), store.workers.count()) == (0, 0)


def test_a_job_that_waits_for_a_device_counts_against_its_tenants_limit(new_store: NewStore) -> None:
    store = new_store(TenantLimits(Limits(queued_jobs=1), {}))
    wait(store, "one", device="cuda")
    with pytest.raises(QueueFull):
        store.records.require_place("one")
    with pytest.raises(QueueFull):
        wait(store, "one")


def test_a_claim_among_ten_thousand_costs_what_one_among_few_does_and_keeps_the_order(
    store: JobStore, redis: Redis
) -> None:
    def spent() -> int:
        """Commands that Redis has run so far, those of scripts too."""
        stats = redis.info("commandstats")
        return sum(int(of["calls"]) for name, of in stats.items() if name != "cmdstat_info")

    def cost() -> tuple[int, str]:
        before = spent()
        attempt = begin(store)
        cost = spent() - before
        tenant = tenant_of(store, attempt)
        assert store.tasks.succeed(attempt, RESULT, "folder")
        return cost, tenant

    wait(store, "tenant-0", -10)
    few, _ = cost()
    tenants = [f"tenant-{number}" for number in range(250)]
    for turn in range(40):  # straight into Redis, as `create` would, since making 10,000 jobs takes a minute
        with redis.pipeline(transaction=False) as writes:
            for number, tenant in enumerate(tenants):
                job = f"{turn:012x}{number:016x}"
                task = f"{job}-merge-0"
                record: dict[Any, Any] = {"tenant": tenant, "name": "n", "attempt": 0, "status": "queued"}
                record |= {"priority": turn % 3, "request": "{}", "labels": "{}", "inputs": "{}", "progress": "{}"}
                record["created_ms"] = turn
                writes.hset(f"queue:job:{job}", mapping=record)
                writes.hset(f"queue:task:{task}", mapping={"attempt": 0, "losses": 0, "state": "queued"})
                writes.zadd("queue:due", {task: 0})
            writes.execute()
    store.tasks.adopt()
    assert sum(tenant.waiting for tenant in store.tasks.counts()) == 10_000
    costs, served = zip(*(cost() for _ in tenants), strict=True)
    assert max(costs) <= few + 2, "no claim reads more, however many wait"
    assert sorted(served) == sorted(tenants), "each of 250 tenants had its turn"


def test_cancelled_jobs_leave_the_queue(store: JobStore, redis: Redis) -> None:
    jobs = [wait(store, "one") for _ in range(3)]
    assert store.records.cancel(jobs[0]) is Status.CANCELLED
    assert begin(store).task == TaskId.parse(f"{jobs[1]}-merge-0")
    assert store.records.cancel(jobs[2]) is Status.CANCELLED
    assert store.tasks.claim("worker") is None
    assert (redis.zcard("queue:turns"), redis.zcard("queue:ranks")) == (0, 0)
    assert store.records.retry(jobs[0])
    assert begin(store).task.job == jobs[0]
