"""Watching jobs of the running service: events as they come, through every interruption, and long polls."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client, Event, LogEntry, Progress, StatusChange
from tests.conftest import HANGS_S, Service, make_service, measured_anew, tiny_recipe, wait_until
from tests.tiny import write_rows

ROWS = 4000  # scored long enough for a middle
READERS = 50
FINAL = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Iterator[Service]:
    for seed, (name, labels) in enumerate({"a": 2, "b": 3}.items()):
        write_rows(tiny_inputs / "rows" / f"many-{name}.jsonl", count=ROWS, labels=labels, seed=seed)
    service = make_service(tmp_path_factory.mktemp("events"), tiny_inputs, MASKMERGE_LEASE_SECONDS="3")
    service.start()
    yield service
    assert service.stop() == 0
    assert "Traceback" not in service.log


def long_recipe() -> dict[str, Any]:
    recipe = tiny_recipe("a", "b", examples=ROWS)
    for model in recipe["models"]:
        model["dataset"]["source"] = f"local:rows/many-{model['name']}.jsonl"
    return measured_anew(recipe)


def client(service: Service) -> Client:
    return Client(f"http://127.0.0.1:{service.port}")


def events(service: Service, job_id: str, last_event_id: int | None = None) -> Iterator[Event]:
    with client(service) as connected:
        yield from connected.events(job_id, last_event_id)


def raw(service: Service, job_id: str, last_event_id: int | None = None) -> httpx.Response:
    """One connection, to its end."""
    headers = {"Last-Event-ID": str(last_event_id)} if last_event_id else {}
    return service.get(f"/jobs/{job_id}/events", headers=headers)


class Watch(threading.Thread):
    """Follows a job beside the test; connects again by itself."""

    def __init__(self, service: Service, job_id: str) -> None:
        super().__init__(daemon=True)
        self._source = events(service, job_id)
        self.seen: list[Event] = []
        self.start()

    def run(self) -> None:
        for event in self._source:
            self.seen.append(event)

    def wait_for(self, condition: Callable[[Event], Any], what: str) -> None:
        wait_until(lambda: any(condition(event) for event in list(self.seen)), what)

    def end(self) -> list[Event]:
        self.join(HANGS_S)
        assert not self.is_alive(), "the stream does not end"
        return self.seen


def is_scoring(event: Event) -> bool:
    return isinstance(event.data, Progress) and event.data.phase == "scoring" and event.data.done > 0


def statuses(seen: list[Event]) -> list[str]:
    return [event.data.status for event in seen if isinstance(event.data, StatusChange)]


def attempts_of(seen: list[Event]) -> list[str]:
    """What was logged of attempts, without the notes of the result."""
    codes = [event.data.code for event in seen if isinstance(event.data, LogEntry)]
    return [code for code in codes if code != "note"]


def check_whole(service: Service, job_id: str, seen: list[Event]) -> None:
    """Every event once and in order, exactly as a later reader gets them, the last one final."""
    assert [event.id for event in seen] == list(range(1, len(seen) + 1))
    assert seen == list(events(service, job_id))
    assert statuses(seen)[-1] in FINAL
    assert seen[-1].event == "status"


def test_events_tell_a_job_from_its_beginning_to_its_end(service: Service) -> None:
    job = service.post("/merge", json=long_recipe()).json()
    assert job["links"]["events"] == f"/jobs/{job['id']}/events"
    seen = Watch(service, job["id"]).end()
    check_whole(service, job["id"], seen)
    assert statuses(seen) == ["queued", "running", "succeeded"]
    progress = [event.data for event in seen if isinstance(event.data, Progress)]
    assert [p.fraction for p in progress] == sorted(p.fraction for p in progress)
    assert {"loading", "scoring", "done"} <= {p.phase for p in progress}
    assert attempts_of(seen) == ["attempt_started"]
    logged = [event.data for event in seen if isinstance(event.data, LogEntry)]
    assert [entry.message for entry in logged if entry.code == "note"] == service.job(job["id"])["result"]["notes"]
    response = raw(service, job["id"], seen[-1].id)
    assert (response.status_code, response.content) == (204, b"")
    with client(service) as connected:
        assert connected.wait(job["id"]).model_dump(mode="json") == service.job(job["id"])
        assert list(connected.log(job["id"])) == logged


def test_a_reader_that_was_cut_off_goes_on_where_it_was(service: Service) -> None:
    job_id = service.submit(long_recipe())
    seen: list[Event] = []
    while not seen or getattr(seen[-1].data, "status", None) not in FINAL:
        for event in events(service, job_id, seen[-1].id if seen else None):
            seen.append(event)
            if isinstance(event.data, Progress):
                break  # and with it the connection
    check_whole(service, job_id, seen)


@pytest.mark.long
def test_a_cancel_is_seen_and_a_retry_goes_on_in_the_same_log(service: Service) -> None:
    job_id = service.submit(long_recipe())
    watch = Watch(service, job_id)
    watch.wait_for(is_scoring, "scoring")
    service.post(f"/jobs/{job_id}/cancel")
    assert statuses(watch.end())[-2:] == ["cancelling", "cancelled"]
    service.post(f"/jobs/{job_id}/retry")
    again = Watch(service, job_id).end()
    check_whole(service, job_id, again)
    assert statuses(again) == ["queued", "running", "cancelling", "cancelled", "queued", "running", "succeeded"]


def test_a_deleted_job_has_no_events(service: Service) -> None:
    job_id = service.submit(tiny_recipe("a", name="average"))
    seen = Watch(service, job_id).end()
    with service.http as http:
        assert http.delete(f"/jobs/{job_id}").status_code == 204
    response = raw(service, job_id, seen[0].id)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.long
def test_many_readers_at_once_see_the_same(service: Service) -> None:
    job_id = service.submit(long_recipe())
    watches = [Watch(service, job_id) for _ in range(READERS)]
    logs = [watch.end() for watch in watches]
    check_whole(service, job_id, logs[0])
    assert all(log == logs[0] for log in logs)


# --- Prefer: wait=N


def test_a_merge_that_ends_in_time_is_answered_with_its_end(service: Service) -> None:
    response = service.post("/merge", json=tiny_recipe("a", name="average"), headers={"Prefer": "wait=60"})
    assert (response.status_code, response.json()["status"]) == (202, "succeeded")
    assert response.headers["Preference-Applied"] == "wait=60"
    assert response.headers["Location"] == f"/jobs/{response.json()['id']}"


def test_a_merge_that_takes_longer_is_answered_as_it_is_then(service: Service) -> None:
    headers = {"Prefer": "wait=1", "Idempotency-Key": "waits"}
    started = time.monotonic()
    recipe = long_recipe()
    first = service.post("/merge", json=recipe, headers=headers)
    assert time.monotonic() - started >= 1
    assert (first.status_code, first.json()["status"]) == (202, "running")
    again = service.post("/merge", json=recipe, headers={**headers, "Prefer": "wait=600"})
    assert (again.json()["id"], again.json()["status"]) == (first.json()["id"], "succeeded")
    assert again.headers["Preference-Applied"] == "wait=60"


@pytest.mark.parametrize("prefer", ["wait=soon", "respond-async", "wait=-1"])
def test_a_preference_that_cannot_be_honoured_is_ignored(service: Service, prefer: str) -> None:
    response = service.post("/merge", json=tiny_recipe("a", name="average"), headers={"Prefer": prefer})
    assert response.status_code == 202
    assert response.json()["finished_at"] is None
    assert "Preference-Applied" not in response.headers
    service.finished(response.json()["id"])


def test_a_long_poll_answers_with_the_next_change_and_with_304_when_there_is_none(service: Service) -> None:
    path = f"/jobs/{service.submit(long_recipe())}"
    states = [service.get(path)]
    while states[-1].json()["finished_at"] is None:
        known = {"If-None-Match": states[-1].headers["ETag"]} if len(states) % 2 else {}
        states.append(service.get(path, headers={"Prefer": "wait=20", **known}))
        assert (states[-1].status_code, states[-1].headers["Preference-Applied"]) == (200, "wait=20")
        assert states[-1].headers["ETag"] != states[-2].headers["ETag"]
    assert len(states) > 3
    known = {"If-None-Match": states[-1].headers["ETag"]}
    response = service.get(path, headers={"Prefer": "wait=1", **known})
    assert (response.status_code, response.headers["Preference-Applied"]) == (304, "wait=1")
    assert response.headers["ETag"] == states[-1].headers["ETag"]
    assert service.get(path, headers={"Prefer": "wait=60"}).json()["status"] == "succeeded"  # ended: at once


@pytest.mark.long
def test_the_service_answers_while_60_long_polls_wait(service: Service) -> None:
    running = service.submit(long_recipe())
    path = f"/jobs/{service.submit(tiny_recipe('a', name='average'))}"
    known = {"If-None-Match": service.get(path).headers["ETag"], "Prefer": "wait=60"}
    with ThreadPoolExecutor(60) as pool:
        polls = [pool.submit(service.get, path, headers=known) for _ in range(60)]
        assert service.get("/healthz").status_code == 200
        assert service.job(running)["finished_at"] is None
        assert not any(poll.done() for poll in polls)
        service.post(f"{path}/cancel")
        assert {poll.result().json()["status"] for poll in polls} == {"cancelled"}
    service.finished(running)


# --- faults


@pytest.mark.parametrize(
    "role", [pytest.param("worker", marks=pytest.mark.long), "api", pytest.param("redis", marks=pytest.mark.long)]
)
def test_no_event_is_lost_or_doubled_when_a_process_is_killed(service: Service, role: str) -> None:
    job_id = service.submit(long_recipe())
    watch = Watch(service, job_id)
    watch.wait_for(is_scoring, "scoring")
    service.processes()[role].send_signal(signal.SIGKILL)
    seen = watch.end()
    check_whole(service, job_id, seen)
    attempts = 2 if role == "worker" else 1
    logged = ["attempt_started", "attempt_lost"] * (attempts - 1) + ["attempt_started"]
    assert attempts_of(seen) == logged
    assert statuses(seen) == ["queued", "running"] * attempts + ["succeeded"]


@pytest.mark.long
def test_a_service_that_stops_ends_its_streams_and_polls_in_good_order(service: Service) -> None:
    job_id = service.submit(long_recipe())
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(raw, service, job_id)
        wait_until(lambda: service.job(job_id)["progress"]["phase"] == "scoring", "scoring")
        poll = pool.submit(service.post, "/merge", json=tiny_recipe(), headers={"Prefer": "wait=60"})
        wait_until(lambda: service.get("/jobs?status=queued").json()["data"], "the merge to be accepted")
        assert service.stop() == 0
        before = [json.loads(line[6:]) for line in stream.result().text.splitlines() if line.startswith("data: ")]
        assert poll.result().json()["status"] == "queued"
    assert before[0]["status"] == "queued"
    assert "Traceback" not in service.log
    assert "Cancel " not in service.log
    service.start()
    seen = Watch(service, job_id).end()
    check_whole(service, job_id, seen)
    assert [event.data.model_dump(mode="json") for event in seen][: len(before)] == before
    assert "attempt_handed_back" in attempts_of(seen)
    assert service.finished(poll.result().json()["id"])["status"] == "succeeded"
