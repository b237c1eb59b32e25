"""A real service that is watched: what its metrics, its log and its traces tell of a job whose worker was killed."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from redis import Redis

from app.contracts.api_keys import NewKey, Scope
from app.embedded_redis import opened
from app.storage.api_keys import ApiKeys
from tests.conftest import make_service, measured_anew, tiny_recipe
from tests.otlp import ReceivedSpan, Receiver, receiving
from tests.tiny import write_rows
from tests.unit.test_monitoring_files import expressions, names_in

ROWS = 3000  # scored in more than a second, so that the phase is seen
TRACE, CALLER = "c" * 32, "d" * 16
REQUEST = "a-request.1"


@dataclass
class Watched:
    """What was seen of a job, after its service has ended."""

    job: dict[str, Any]
    series: dict[str, dict[tuple[tuple[str, str], ...], float]]
    """Values by the series' name and labels."""
    log: str
    text: str
    """The job's own log."""
    spans: list[ReceivedSpan]
    secrets: list[str]

    def value(self, name: str, **labels: str) -> float:
        return self.series[name][tuple(sorted(labels.items()))]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.log.splitlines() if not re.match(r"\d+:[MCX] |\d+:signal-handler", line)
        ]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path, receiver: Receiver) -> Watched:
    for seed, name in enumerate(("a", "b")):
        write_rows(tiny_inputs / "rows" / f"watched-{name}.jsonl", count=ROWS, labels=2 + seed, seed=seed)
    service = make_service(
        tmp_path_factory.mktemp("watched"),
        tiny_inputs,
        MASKMERGE_LOG_FORMAT="json",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
    )
    with opened(service.data_dir) as url, Redis.from_url(url, decode_responses=True) as redis:
        keys = ApiKeys(redis, "maskmerge")
        made = {scope: keys.create(NewKey(tenant="search", scopes=[scope])).key for scope in Scope}
    service.key = made[Scope.WRITE]
    service.start()
    try:
        recipe = tiny_recipe("a", "b", examples=ROWS)
        for model in recipe["models"]:
            model["dataset"]["source"] = f"local:rows/watched-{model['name']}.jsonl"
        headers = {"X-Request-ID": REQUEST, "traceparent": f"00-{TRACE}-{CALLER}-01"}
        job_id = service.post("/merge", json=measured_anew(recipe), headers=headers).raise_for_status().json()["id"]
        service.stand_still(job_id, "scoring")
        service.processes()["worker"].kill()
        job = service.finished(job_id)
        assert service.post("/jobs/secret-path?secret=query").status_code == 405
        text = service.get(f"/jobs/{job_id}/log").raise_for_status().text
        metrics = service.get("/metrics", headers={"Authorization": f"Bearer {made[Scope.METRICS]}"}).raise_for_status()
    finally:
        service.stop()
    series: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for sample in (sample for family in parse(metrics.text) for sample in family.samples):
        series.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Watched(job, series, service.log, text, receiver.spans, list(made.values()))


def test_metrics_count_a_job_once_though_its_worker_was_killed(watched: Watched) -> None:
    assert (watched.job["status"], watched.job["attempt"]) == ("succeeded", 2)
    assert watched.value("maskmerge_jobs_accepted_total", tenant="search", kind="merge") == 1
    assert watched.value("maskmerge_jobs_finished_total", tenant="search", kind="merge", outcome="succeeded") == 1
    assert watched.value("maskmerge_attempts_started_total", tenant="search") == 2
    assert watched.value("maskmerge_attempts_lost_total", tenant="search", cause="lease") == 1
    assert watched.value("maskmerge_http_requests_total", method="POST", route="/merge", status="202") == 1
    assert watched.value("maskmerge_examples_measured_total") == 2 * ROWS
    timings = watched.job["result"]["timings"]
    for phase in ("queue", "load", "score", "merge", "evaluate", "publish"):
        assert watched.value("maskmerge_job_phase_seconds_count", phase=phase) == 1
        assert watched.value("maskmerge_job_phase_seconds_sum", phase=phase) == timings[f"{phase}_seconds"]
    peak = watched.job["result"]["peak_memory_bytes"]
    assert watched.value("maskmerge_job_peak_memory_bytes_sum", device="cpu") == peak
    assert watched.value("maskmerge_redis_up") == watched.value("maskmerge_workers") == 1


def test_dashboard_and_alerts_ask_for_series_of_a_real_scrape(watched: Watched) -> None:
    asked = {name for expression in expressions().values() for name in names_in(expression)}
    assert asked
    assert asked <= set(watched.series)


def test_every_line_is_json_and_knows_what_it_is_about(watched: Watched) -> None:
    lines, job = watched.lines, watched.job["id"]
    assert {line["process"] for line in lines} >= {"supervisor", "api", "worker"}
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert {"level", "logger", "message"} <= set(line)
    (accepted,) = [line for line in lines if line.get("method") == "POST" and line["status"] == 202]
    assert (accepted["request_id"], accepted["job"], accepted["tenant"]) == (REQUEST, job, "search")
    assert (accepted["route"], accepted["trace_id"]) == ("/merge", TRACE)
    attempts = [line for line in lines if line["logger"] == "worker.tasks" and "attempt" in line]
    assert {line["attempt"] for line in attempts} == {1, 2}
    assert {line["job"] for line in attempts} == {job}
    ended = [line for line in attempts if "ends" in line["message"]]
    assert [line["message"] for line in ended] == ["the attempt ends: succeeded"]
    assert (ended[0]["request_id"], ended[0]["tenant"], ended[0]["trace_id"]) == (REQUEST, "search", TRACE)
    engine = [line for line in lines if line["process"] == "engine" and "job" in line]
    assert all((line["job"], line["request_id"]) == (job, REQUEST) for line in engine)


def test_the_log_has_no_key_no_path_and_no_query(watched: Watched) -> None:
    for secret in watched.secrets:
        assert secret not in watched.log
        assert secret.rpartition("_")[2] not in watched.log
    assert "secret-path" not in watched.log
    assert "secret=query" not in watched.log


def test_one_trace_has_the_request_the_queue_and_both_attempts_with_their_phases(watched: Watched) -> None:
    spans = [span for span in watched.spans if span.trace == TRACE]
    (request,) = [span for span in spans if span.name == "POST /merge"]
    assert (request.service, request.parent, request.failed) == ("maskmerge-api", CALLER, False)
    assert request.attributes["http.response.status_code"] == "202"
    (queue,) = [span for span in spans if span.name == "queue"]
    (attempt,) = [span for span in spans if span.name == "attempt"]
    assert queue.parent == attempt.parent == request.id
    assert (attempt.service, attempt.attributes["maskmerge.attempt"]) == ("maskmerge-worker", "2")
    assert attempt.attributes["maskmerge.outcome"] == "succeeded"
    phases = [span for span in spans if span.parent == attempt.id]
    assert [span.name for span in sorted(phases, key=lambda span: span.begin)] == [
        "loading", "scoring", "merging", "aligning", "evaluating", "publishing",
    ]  # fmt: skip
    assert all(attempt.begin <= span.begin <= span.end <= attempt.end for span in phases)


def test_the_jobs_own_log_tells_of_both_attempts(watched: Watched) -> None:
    words = [line.split(" ", 3) for line in watched.text.splitlines()]
    assert [f"{number} {text.partition(':')[0]}" for _, _, number, text in words if not text.startswith("note")] == [
        "0 queued",
        "1 running",
        "1 attempt_started",
        "1 attempt_lost",
        "1 queued",
        "2 running",
        "2 attempt_started",
        "2 succeeded",
    ]
