"""Spans of attempts, at a real receiver; and nothing at all where none is named."""

import logging
import subprocess
import sys
import time

import pytest

from app.contracts.jobs import Attempt, JobKind, Progress, Record, Stage, Status, TaskId
from app.observability.traces import ENDPOINTS, Span, Tracer, open_tracer
from tests.conftest import REPOSITORY
from tests.otlp import receiving
from worker.trace import AttemptTrace

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
CREATED = 1_796_092_296_000


def record(traceparent: str | None = PARENT) -> Record:
    return Record(
        id="j", tenant="search", key=None, kind=JobKind.MERGE, name="", status=Status.RUNNING, attempt=1, error=None,
        created_ms=CREATED, started_ms=CREATED + 500, finished_ms=None, expires_ms=None, progress=Progress(),
        labels={}, priority=0, revision=1, request={}, result=None, inputs={}, artifact=None, request_id=None,
        traceparent=traceparent,
    )  # fmt: skip


def attempt(number: int) -> Attempt:
    return Attempt(task=TaskId(job="j", stage=Stage.MERGE), number=number)


def test_an_attempt_is_a_span_with_its_wait_before_it_and_its_phases_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        tracer = open_tracer("worker")
        trace = AttemptTrace(tracer, record(), attempt(1))
        for phase in ("loading", "scoring", "scoring", "merging"):
            trace.enters(phase)
        trace.outcome, trace.failed = "succeeded", False
        trace.ends()
        tracer.close()
    assert {path for path, _ in receiver.requests} == {"/v1/traces"}
    spans = {span.name: span for span in receiver.spans}
    assert list(spans) == ["queue", "loading", "scoring", "merging", "attempt"]
    assert {span.trace for span in spans.values()} == {"a" * 32}
    assert {span.service for span in spans.values()} == {"maskmerge-worker"}
    assert spans["queue"].parent == spans["attempt"].parent == "b" * 16
    assert (spans["queue"].begin, spans["queue"].end) == (CREATED * 10**6, (CREATED + 500) * 10**6)
    assert {spans[phase].parent for phase in ("loading", "scoring", "merging")} == {spans["attempt"].id}
    assert spans["attempt"].attributes == {
        "maskmerge.job": "j", "maskmerge.attempt": "1", "maskmerge.kind": "merge", "maskmerge.tenant": "search",
        "maskmerge.outcome": "succeeded",
    }  # fmt: skip
    assert trace.facts == {"trace_id": "a" * 32, "span_id": spans["attempt"].id, "trace_flags": "01"}
    assert not any(span.failed for span in spans.values())


def test_a_later_attempt_that_is_lost_has_failed_in_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.url}/here")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "merges")
        tracer = open_tracer("worker")
        trace = AttemptTrace(tracer, record(None), attempt(2))
        trace.enters("scoring")
        trace.ends()
        tracer.close()
    assert receiver.requests == [("/here", "application/x-protobuf")]
    assert [(span.service, span.name, span.failed) for span in receiver.spans] == [
        ("merges", "scoring", True),
        ("merges", "attempt", True),
    ]
    assert receiver.spans[1].attributes["maskmerge.outcome"] == "lost"
    assert receiver.spans[1].parent == ""


def test_whoever_sent_the_request_decides_whether_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        tracer = open_tracer("api")
        span = tracer.span("request", "server", PARENT.removesuffix("01") + "00")
        assert (span.traceparent or "").startswith(f"00-{'a' * 32}-")
        assert (span.traceparent or "").endswith("-00")
        span.end()
        for malformed in ("", "00-zz", f"00-{'0' * 32}-{'b' * 16}-01", "x" * 10_000):
            other = tracer.span("request", "server", malformed)
            other.rename("a trace of its own")
            other.end()
        tracer.close()
    assert {(span.name, span.parent) for span in receiver.spans} == {("a trace of its own", "")}
    assert len({span.trace for span in receiver.spans}) == 4


def test_a_receiver_that_is_not_there_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    tracer = open_tracer("api")
    tracer.span("request").end()
    began = time.monotonic()
    tracer.close()
    assert time.monotonic() - began < 12, "the supervisor waits for 15 s"


@pytest.mark.parametrize("off", [{}, {ENDPOINTS[0]: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}])
def test_without_a_receiver_nothing_of_it_is_imported(off: dict[str, str]) -> None:
    code = (
        "import sys, app.main, worker.__main__\n"
        "from app.observability.traces import open_tracer\n"
        "assert open_tracer('api').span('a').traceparent is None\n"
        "assert not {'opentelemetry.sdk.trace', 'opentelemetry.exporter'} & set(sys.modules)"  # others use the rest
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=off, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_without_the_extra_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "app.observability.otlp", None)
    tracer = open_tracer("api")
    assert type(tracer) is Tracer
    assert type(tracer.span("a")) is Span
    assert "maskmerge[tracing]" in caplog.text
