"""What `GET /metrics` tells: of jobs what Redis counts, once each; of requests what the process has answered."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from pydantic import SecretStr
from redis import Redis

from app.api.metrics import OPEN, SharedMetrics
from app.contracts.api_keys import NewKey, Scope
from app.contracts.jobs import Attempt, ErrorCode, JobError, JobKind, Stage, TaskId
from app.contracts.settings import Settings
from app.main import create_app
from app.observability.metrics import METRICS, PHASE
from app.storage.api_keys import ApiKeys
from app.storage.jobs import JobStore
from app.storage.records import NewJob
from tests.conftest import BASE_URL, HERE, RESULT, assert_problem
from worker.engine.catalog.contracts.report import ModelResult, Timings

FAILURE = JobError(code=ErrorCode.INVALID_DATASET, message="broken")
MODEL = ModelResult(
    name="a", checkpoint="local:a", digest="", examples=64, score_seconds=0.5, score_cached=False, aligned_examples=0,
    weight_share=None, parameters={},
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(redis_url=SecretStr(redis_url), data_dir=tmp_path_factory.mktemp("metrics"), queue="metrics")


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), BASE_URL, client=HERE) as client:
        yield client


@pytest.fixture
def store(redis: Redis) -> JobStore:
    return JobStore(redis, "metrics", 10, 3)


@pytest.fixture
def told(api: TestClient, redis: Redis) -> Callable[..., float]:
    """Returns the value of a series by its name and labels, as a scrape tells it."""

    def value(name: str, **labels: str) -> float:
        families = parse(api.get("/metrics").raise_for_status().text)
        found = [s.value for f in families for s in f.samples if (s.name, s.labels) == (name, labels)]
        assert len(found) == 1, (name, labels, found)
        return float(found[0])

    return value


def accepted(store: JobStore, tenant: str = "default") -> TaskId:
    made = store.records.create(NewJob({}, "name", tenant=tenant, kind=JobKind.MERGE))
    return TaskId(job=made.job_id, stage=Stage.MERGE)


def begun(store: JobStore, task: TaskId) -> Attempt:
    """The attempt at the only task that waits."""
    attempt = store.tasks.claim("worker")
    assert attempt is not None
    assert attempt.task == task
    return attempt


def test_a_job_counts_once_however_often_its_writes_are_repeated(store: JobStore, told: Callable[..., float]) -> None:
    task = accepted(store, "search")
    lost = begun(store, task)
    assert store.tasks.claim("another") is None
    for _ in range(2):
        store.tasks.release(lost, lost=True)
    late = store.tasks.succeed(lost, RESULT, "late")
    attempt = begun(store, task)
    result = RESULT.model_copy(
        update={
            "models": [MODEL, MODEL.model_copy(update={"score_cached": True})],
            "timings": Timings(queue_seconds=0.2, merge_seconds=7, publish_seconds=7),
        }
    )
    assert [late, *(store.tasks.succeed(attempt, result, "artifact") for _ in range(2))] == [False, True, True]
    assert told("maskmerge_jobs_accepted_total", tenant="search", kind="merge") == 1
    assert told("maskmerge_attempts_started_total", tenant="search") == 2
    assert told("maskmerge_attempts_lost_total", tenant="search", cause="engine") == 1
    assert told("maskmerge_jobs_finished_total", tenant="search", kind="merge", outcome="succeeded") == 1
    assert told("maskmerge_statistics_lookups_total", result="hit") == 1
    assert told("maskmerge_statistics_lookups_total", result="miss") == 1
    assert told("maskmerge_examples_measured_total") == 64
    assert told("maskmerge_examples_measuring_seconds_total") == 0.5
    assert told("maskmerge_job_peak_memory_bytes_sum", device="cpu") == RESULT.peak_memory_bytes
    assert told("maskmerge_job_phase_seconds_sum", phase="merge") == 7
    for bound, count in {"0.1": 0, "5.0": 0, "10.0": 1, "30.0": 1, "+Inf": 1}.items():
        assert told("maskmerge_job_phase_seconds_bucket", phase="merge", le=bound) == count
    assert told("maskmerge_job_phase_seconds_count", phase="score") == 0, "a phase that was skipped took no time"


def test_every_end_is_counted_with_its_outcome(store: JobStore, told: Callable[..., float]) -> None:
    assert store.tasks.fail(begun(store, accepted(store)), FAILURE)
    store.records.cancel(accepted(store).job)
    cancelled = begun(store, accepted(store))
    store.records.cancel(cancelled.task.job)
    assert store.tasks.acknowledge_cancel(cancelled)
    hopeless = accepted(store)
    for _ in range(3):
        store.tasks.release(begun(store, hopeless), lost=True)
    finished = {"tenant": "default", "kind": "merge"}
    assert told("maskmerge_jobs_finished_total", outcome="failed", **finished) == 2
    assert told("maskmerge_jobs_finished_total", outcome="cancelled", **finished) == 2
    assert told("maskmerge_jobs_finished_total", outcome="succeeded", **finished) == 0
    assert told("maskmerge_job_failures_total", tenant="default", code="invalid_dataset") == 1
    assert told("maskmerge_job_failures_total", tenant="default", code="worker_lost") == 1
    assert told("maskmerge_attempts_lost_total", tenant="default", cause="engine") == 3


def test_a_lease_that_ran_out_is_told_from_an_engine_that_died(redis: Redis, told: Callable[..., float]) -> None:
    now = 1_800_000_000_000
    store = JobStore(redis, "metrics", 10, 3, lambda: now)
    attempt = begun(store, accepted(store))
    assert not store.tasks.release(attempt, lost=True, only_expired=True)
    assert told("maskmerge_attempts_lost_total", tenant="default", cause="lease") == 0
    now += 10_001
    assert store.tasks.release(attempt, lost=True, only_expired=True)
    assert told("maskmerge_attempts_lost_total", tenant="default", cause="lease") == 1


def test_what_waits_and_runs_is_told_by_tenant_with_the_age_of_the_oldest(
    redis: Redis, told: Callable[..., float]
) -> None:
    def at(seconds_ago: float) -> JobStore:
        return JobStore(redis, "metrics", 3600, 3, lambda: int(1000 * (time.time() - seconds_ago)))

    first = accepted(at(200))
    labels = {"tenant": "default", "status": "running"}
    assert told("maskmerge_jobs_active", **labels) == told("maskmerge_jobs_oldest_age_seconds", **labels) == 0
    attempt = at(30).tasks.claim("worker")
    assert attempt is not None
    assert attempt.task == first
    assert told("maskmerge_jobs_active", **labels) == 1
    assert told("maskmerge_jobs_oldest_age_seconds", **labels) == pytest.approx(30, abs=20)
    assert told("maskmerge_jobs_active", tenant="default", status="queued") == 0
    for seconds_ago in (100, 50):
        accepted(at(seconds_ago), "search")
    waiting = {"tenant": "search", "status": "queued"}
    assert told("maskmerge_jobs_active", **waiting) == 2
    assert told("maskmerge_jobs_oldest_age_seconds", **waiting) == pytest.approx(100, abs=20)


@pytest.mark.parametrize("is_open", [False, True], ids=["text", "OpenMetrics"])
def test_every_metric_is_told_from_the_start_under_a_name_as_prometheus_wants_it(
    api: TestClient, redis: Redis, is_open: bool
) -> None:
    api.get("/jobs")
    answer = api.get("/metrics", headers={"Accept": f"{OPEN}; version=1.0.0, */*;q=0.1"} if is_open else {})
    assert answer.headers["Content-Type"].startswith(OPEN if is_open else "text/plain; version=0.0.4")
    families = {family.name: family for family in (parse_open if is_open else parse)(answer.text)}
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        assert family.samples, metric.name
        assert {name for s in family.samples for name in s.labels} - {"le"} == set(metric.label_names)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not re.search("_(ms|milliseconds|minutes|kb|mb|percent)", metric.name), "base units alone"
    assert families["process_resident_memory_bytes"].samples


def test_series_have_templates_of_paths_and_no_method_that_a_client_invents(api: TestClient, redis: Redis) -> None:
    for number in range(3):
        api.get(f"/jobs/{number:028x}")
        api.get(f"/nothing/{number}")
        api.request(f"INVENTED{number}", "/jobs")
        api.head("/jobs")
    text = api.get("/metrics").text
    counts = {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for f in parse(text)
        for s in f.samples
        if s.name == "maskmerge_http_requests_total"
    }
    assert counts["GET", "/jobs/{job_id}", "404"] == 3
    assert counts["GET", "", "404"] == 3
    assert counts["other", "/jobs", "405"] == 3
    assert counts["HEAD", "/jobs", "200"] == 3
    assert "INVENTED" not in text
    assert not re.search("0{27}", text)


class Counting(Redis):
    """A client that keeps the names of the commands that it sent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sent: list[str] = []

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        self.sent.append(str(arguments[0]))
        return super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]


def test_a_scrape_asks_the_same_of_redis_however_many_jobs_there_are(
    redis: Redis, redis_url: str, store: JobStore, tmp_path: Path
) -> None:
    with Counting.from_url(redis_url, decode_responses=True) as client:
        shared = SharedMetrics(JobStore(client, "metrics", 10, 3), tmp_path)

        def asked() -> list[str]:
            client.sent.clear()
            assert list(shared.collect())
            return list(client.sent)

        few = asked()
        for _ in range(100):
            accepted(store)
        assert asked() == few
    assert "HGETALL" in few
    assert not {"KEYS", "SCAN"} & set(few)


def test_metrics_need_a_key_for_them_which_allows_nothing_else(api: TestClient, redis: Redis) -> None:
    keys = ApiKeys(redis, "metrics")
    headers = {
        scope: {"Authorization": f"Bearer {keys.create(NewKey(tenant='search', scopes=[scope])).key}"}
        for scope in Scope
    }
    assert_problem(api.get("/metrics"), 401, "unauthenticated")
    for scope in (Scope.READ, Scope.WRITE):
        refused = api.get("/metrics", headers=headers[scope])
        assert_problem(refused, 403, "insufficient_scope")
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope", scope="metrics"'
    for scope in (Scope.METRICS, Scope.ADMIN):
        assert api.get("/metrics", headers=headers[scope]).status_code == 200
    assert_problem(api.get("/jobs", headers=headers[Scope.METRICS]), 403, "insufficient_scope")
    assert_problem(api.post("/merge", json={}, headers=headers[Scope.METRICS]), 403, "insufficient_scope")
    assert_problem(api.get("/keys", headers=headers[Scope.METRICS]), 403, "insufficient_scope")


def test_without_redis_the_metrics_say_so_and_nothing_else(tmp_path: Path) -> None:
    settings = Settings(redis_url=SecretStr("redis://127.0.0.1:1"), data_dir=tmp_path)
    with TestClient(create_app(settings), BASE_URL, client=HERE) as api:
        api.get("/healthz")
        answer = api.get("/metrics")
    assert answer.status_code == 200
    samples = [(s.name, s.value) for family in parse(answer.text) for s in family.samples]
    assert samples == [("maskmerge_redis_up", 0)]


def test_a_value_falls_into_one_bucket(store: JobStore) -> None:
    store.tasks.succeed(
        begun(store, accepted(store)),
        RESULT.model_copy(update={"timings": Timings(queue_seconds=1e9, load_seconds=PHASE.buckets[0])}),
        "artifact",
    )
    sums = store.sums.read()
    assert sums["maskmerge_job_phase_seconds queue inf"] == 1
    assert sums["maskmerge_job_phase_seconds load 0.1"] == 1
    assert sums["maskmerge_job_phase_seconds queue sum"] == 1e9
