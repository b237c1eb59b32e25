"""The client, on servers that fail, cut and answer as the service and what is before it may."""

import asyncio
import hashlib
import inspect
import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import maskmerge
import pytest

from app.client import (
    AsyncClient,
    Client,
    ClientError,
    DownloadFailed,
    Event,
    MergeRequest,
    NoService,
    Refused,
    Status,
    StatusChange,
    TimedOut,
    Unreachable,
    steps,
)
from app.contracts.jobs import ErrorCode, PhaseName
from tests.conftest import RESULT, tiny_recipe
from tests.servers import JOB_ID, STATUS, Answer, Server, cuts, hangs_up, job_body, refuses, sends


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASKMERGE_API_KEY", "MASKMERGE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short here; how long they are is tested by itself."""
    monkeypatch.setattr("app.client.transport.BACKOFF_S", 0.01)
    monkeypatch.setattr(steps, "RECONNECT_S", 0.01)


def both(call: Callable[[Any], Any], url: str, **options: Any) -> list[Any]:
    """What a call returns or raises, with either client; a call that yields gives the list of items."""

    async def awaited() -> Any:
        async with AsyncClient(url, **options) as client:
            found = call(client)
            return [item async for item in found] if inspect.isasyncgen(found) else await found

    found: list[Any] = []
    with Client(url, **options) as client:
        runs: list[Callable[[], Any]] = [lambda: _listed(call(client)), lambda: asyncio.run(awaited())]
        for run in runs:
            try:
                found.append(run())
            except ClientError as error:
                found.append(error)
    return found


def _listed(found: Any) -> Any:
    return list(found) if inspect.isgenerator(found) else found


def test_a_job_is_waited_for_as_long_as_is_allowed() -> None:
    """The service is asked to hold each answer back for no longer than is left."""
    running, ended = (sends(200, job_body(status=status)) for status in ("running", "succeeded"))
    with Server(running) as server:
        for late in both(lambda client: client.wait(JOB_ID, timeout_s=1.05), server.url):
            assert isinstance(late, TimedOut)
            assert isinstance(late, TimeoutError)
            assert f"job {JOB_ID} has not ended within 1.05 s; its state is running" in str(late)
        assert server.asked[0][2]["prefer"] == "wait=1"
        assert "prefer" not in server.asked[-1][2]
    with Server(refuses(503, "not_ready"), running, ended) as server:
        for job in both(lambda client: client.wait(JOB_ID, timeout_s=30), server.url):
            assert job.status is Status.SUCCEEDED


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        names = [name for name in vars(kind) if not name.startswith("_")] + ["__init__"]
        return {name: list(inspect.signature(getattr(kind, name)).parameters.values()) for name in names}

    assert methods(Client) == methods(AsyncClient)
    for name in methods(Client):
        given, awaited = (inspect.signature(getattr(kind, name)).return_annotation for kind in (Client, AsyncClient))
        assert str(awaited).replace("AsyncIterator", "Iterator") == str(given), name
        if name != "__init__":
            assert getattr(AsyncClient, name).__doc__ == getattr(Client, name).__doc__


def test_the_package_hands_on_all_that_the_client_has() -> None:
    import app.client

    assert set(maskmerge.__all__) == set(app.client.__all__)
    for name in maskmerge.__all__:
        assert getattr(maskmerge, name) is getattr(app.client, name)


def test_comments_that_keep_a_connection_alive_are_no_events_and_a_cut_loses_none() -> None:
    first = (
        f"id: 1\nevent: status\ndata: {STATUS % 'queued'}\n\n: still here\n\nid: 2\nevent: status\ndata: {{".encode()
    )
    last = f"id: 2\nevent: status\ndata: {STATUS % 'succeeded'}\n\nid: 3\nevent: news\ndata: {{}}\n\n".encode()
    stream = "text/event-stream"
    answers = [
        cuts(first + b" " * 99, len(first), **{"Content-Type": stream}),
        refuses(503, "redis_unavailable"),
        sends(502, b"<html>", "text/html"),
        sends(200, last, stream),
        sends(204),
    ]
    for call in (lambda client: client.events(JOB_ID), lambda client: client.events(JOB_ID)):
        with Server(*answers, *answers) as server:
            found = both(call, server.url)
            after = [headers.get("last-event-id") for _, _, headers, _ in server.asked]
        for events in found:
            assert [(event.id, event.data.status) for event in events] == [(1, "queued"), (2, "succeeded")]
            assert all(isinstance(event, Event) and isinstance(event.data, StatusChange) for event in events)
        assert after == [None, "1", "1", "1", "3"] * 2


def test_what_may_be_repeated_is_sent_again_with_the_same_key() -> None:
    answers = [hangs_up, refuses(503, "redis_unavailable", Retry_After="0"), sends(202, job_body())]
    with Server(*answers, *answers) as server:
        jobs = both(lambda client: client.submit({"models": []}), server.url)
    assert [job.id for job in jobs] == [JOB_ID] * 2
    keys = [headers["idempotency-key"] for _, _, headers, _ in server.asked]
    assert len(keys) == 6
    assert (len(set(keys[:3])), len(set(keys[3:])), len(set(keys))) == (1, 1, 2)
    with Server(*[hangs_up, sends(204)] * 2) as server:
        assert both(lambda client: client.delete(JOB_ID), server.url) == [None, None]
    with Server(*[hangs_up, refuses(404, "not_found", "job was deleted")] * 2) as server:
        assert both(lambda client: client.delete(JOB_ID), server.url) == [None, None]
    with Server(refuses(404, "not_found")) as server:
        assert [error.code for error in both(lambda client: client.delete(JOB_ID), server.url)] == ["not_found"] * 2


@pytest.mark.parametrize("name", ["cancel", "retry", "validate"])
def test_what_may_not_be_repeated_is_sent_once(name: str) -> None:
    with Server(refuses(503, "redis_unavailable")) as server:
        errors = both(lambda client: getattr(client, name)(JOB_ID), server.url)
        assert [error.code for error in errors] == ["redis_unavailable"] * 2
        assert len(server.asked) == 2


def test_an_answer_that_is_cut_is_asked_for_again() -> None:
    body = json.dumps(job_body()).encode()
    cut = cuts(body, 40, **{"Content-Type": "application/json"})
    with Server(*[cut, sends(200, body)] * 2) as server:
        assert [job.id for job in both(lambda client: client.job(JOB_ID), server.url)] == [JOB_ID] * 2


def test_the_pause_is_the_one_that_the_service_asks_for_and_too_long_a_one_is_not_made() -> None:
    with (
        Server(refuses(429, "too_many", Retry_After="1"), sends(200, job_body())) as server,
        Client(server.url) as client,
    ):
        start = time.monotonic()
        assert client.job(JOB_ID).id == JOB_ID
        assert time.monotonic() - start >= 1
    with Server(refuses(429, "too_many", Retry_After="3600")) as server:
        start = time.monotonic()
        errors = both(lambda client: client.job(JOB_ID), server.url)
        assert time.monotonic() - start < 1 + 1
        assert [(error.code, error.retry_after_s) for error in errors] == [("too_many", 3600)] * 2
        assert len(server.asked) == 2


def test_a_refusal_has_the_problem_with_its_fields_and_the_request() -> None:
    wrong = {"field": "models.0.checkpoint", "message": "no"}
    with Server(refuses(422, "invalid_request", "models.0.checkpoint: no", [wrong], X_Request_ID="r1")) as server:
        for error in both(lambda client: client.submit("models: []"), server.url):
            assert isinstance(error, Refused)
            assert (error.code, error.status, error.request_id) == ("invalid_request", 422, "r1")
            assert (error.errors[0].field, error.errors[0].message) == ("models.0.checkpoint", "no")
            assert str(error) == "422 invalid_request: models.0.checkpoint: no (request r1)"


def test_another_server_and_no_server_are_told_apart() -> None:
    with Server(sends(200, b"<html>", "text/html")) as server:
        url = server.url
        assert [type(error) for error in both(lambda client: client.job(JOB_ID), url)] == [NoService] * 2
        assert "is no maskmerge service: it answers 200, text/html" in str(both(lambda client: client.jobs(), url)[0])
    with Server(sends(200, job_body(status="resting"))) as server:
        [error, _] = both(lambda client: client.job(JOB_ID), server.url)
        assert "(status: must be 'queued'" in str(error)
    with Server(sends(307, Location="http://127.0.0.1:1/jobs")) as server:
        assert [type(error) for error in both(lambda client: client.job(JOB_ID), server.url)] == [NoService] * 2
    for error in both(lambda client: client.job(JOB_ID), url, retries=1):
        assert isinstance(error, Unreachable)
        assert url in str(error)
    assert both(lambda client: client.is_ready(), url) == [False, False]


def test_a_recipe_may_be_a_dictionary_yaml_or_a_typed_request() -> None:
    recipe = tiny_recipe("a", "b")
    with Server(sends(202, job_body(status="failed", error={"code": "timeout", "message": "late"}))) as server:
        for given in (
            recipe,
            "merge_method: linear\n",
            {"merge_method": "linear"},
            MergeRequest.model_validate(recipe),
        ):
            for job in both(partial(_submitted, given), server.url):
                assert job.status is Status.FAILED
                assert job.error.code is ErrorCode.TIMEOUT
                assert job.progress.phase is PhaseName.QUEUED
                assert job.result.timings == RESULT.timings
    kinds = [headers["content-type"] for _, _, headers, _ in server.asked]
    assert kinds == ["application/json"] * 2 + ["application/yaml"] * 4 + ["application/json"] * 2
    assert json.loads(server.asked[-1][3]) == recipe  # without the defaults that nobody wrote


def _submitted(recipe: Any, client: Any) -> Any:
    return client.submit(recipe)


def test_no_name_leads_to_another_route() -> None:
    with Server(refuses(404, "not_found")) as server, Client(server.url) as client:
        for name in ("../keys", "a/b", "..", ".", "", "a?b#c", "a b"):
            with pytest.raises(Refused):
                client.job(name)
            with pytest.raises(Refused):
                client.put(name, {})
    paths = [path for _, path, _, _ in server.asked]
    assert all(path.startswith(("/jobs/", "/merge/")) and path.count("/") == 2 and "?" not in path for path in paths)
    assert [path for path in paths if path.rpartition("/")[2] in ("", ".", "..")] == []


def test_the_key_goes_to_the_service_and_not_to_the_storage_that_it_refers_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASKMERGE_API_KEY", "mm_secret")
    content = b"weights"
    with (
        Server(sends(200, content)) as storage,
        Server(lists({"a.bin": content}), sends(307, Location=f"{storage.url}/signed")) as server,
    ):
        monkeypatch.setenv("MASKMERGE_URL", server.url)
        with Client() as client:
            client.download(JOB_ID, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == content
    assert [headers.get("authorization") for _, _, headers, _ in server.asked] == ["Bearer mm_secret"] * 2
    assert [headers.get("authorization") for _, _, headers, _ in storage.asked] == [None]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lists(files: dict[str, bytes]) -> Answer:
    """The artifact's list of files, at `/NAME` each."""
    entries = [
        {"name": name, "bytes": len(content), "sha256": sha256(content), "media_type": "", "href": f"/{name}"}
        for name, content in files.items()
    ]
    return sends(200, {"files": entries, "archive": "/archive"})


def stores(content: bytes, *cut_after: int, etag: str | None = None) -> list[Answer]:
    """A file with ranges, each answer cut after so many bytes, and then a whole one."""
    tag = etag or f'"{sha256(content)}"'

    def answer(cut: int | None, handler: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=([0-9]+)-", handler.headers.get("Range", ""))
        first = int(asked[1]) if asked and handler.headers.get("If-Range") == tag else 0
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", tag)
        handler.send_header("Content-Length", str(len(content) - first))
        handler.end_headers()
        handler.wfile.write(content[first:] if cut is None else content[first : first + cut])
        handler.close_connection = True

    return [partial(answer, cut) for cut in (*cut_after, None)]


CONTENT = bytes(range(256)) * 20_000  # 5 MB


def ranges(server: Server) -> list[str | None]:
    return [headers.get("range") for _, path, headers, _ in server.asked if not path.endswith("artifacts")]


def test_a_cut_file_is_gone_on_with_where_it_was_cut(tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {"Client": [], "AsyncClient": []}
    answers = [lists({"a.bin": CONTENT}), *stores(CONTENT, 3_000_000, 1_500_000)]

    def download(client: Any) -> Any:
        name = type(client).__name__
        return client.download(JOB_ID, tmp_path / name, on_bytes=told_to(told[name]))

    with Server(*answers, *answers) as server:
        both(download, server.url)
    assert ranges(server) == [None, "bytes=3000000-", "bytes=4500000-"] * 2
    for name, counts in told.items():
        assert [path.name for path in (tmp_path / name).iterdir()] == ["a.bin"]
        assert (tmp_path / name / "a.bin").read_bytes() == CONTENT
        assert counts[-1] == (len(CONTENT), len(CONTENT))
        assert counts == sorted(counts)


def told_to(told: list[tuple[int, int]]) -> Callable[[int, int], None]:
    return lambda there, total: told.append((there, total))


def test_a_later_download_goes_on_with_what_an_earlier_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PATIENCE_S", 0.05)
    with (
        Server(lists({"a.bin": CONTENT}), *stores(CONTENT, 2_000_000)[:1], hangs_up) as server,
        Client(server.url) as one,
        pytest.raises(Unreachable),
    ):
        one.download(JOB_ID, tmp_path)
    [left] = tmp_path.iterdir()
    assert (left.name[:7], left.stat().st_size) == (".a.bin.", 2_000_000)
    with Server(lists({"a.bin": CONTENT}), *stores(CONTENT)) as server, Client(server.url) as another:
        another.download(JOB_ID, tmp_path)
    assert ranges(server) == ["bytes=2000000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_is_another_one_by_now_is_fetched_from_its_beginning(tmp_path: Path) -> None:
    """A storage has ETags of its own, so that the first one is not the sha256."""
    whole = stores(CONTENT, 1_000_000, etag='"first"')[0]
    with (
        Server(lists({"a.bin": CONTENT}), whole, *stores(CONTENT, etag='"second"')) as server,
        Client(server.url) as client,
    ):
        client.download(JOB_ID, tmp_path)
    assert [headers.get("if-range") for _, _, headers, _ in server.asked][1:] == [None, '"first"']
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_other_content_than_announced_gets_no_name(tmp_path: Path) -> None:
    with Server(*[lists({"a.bin": CONTENT}), sends(200, CONTENT[:-1] + b"!")] * 2) as server:
        errors = both(lambda client: client.download(JOB_ID, tmp_path), server.url)
    assert [type(error) for error in errors] == [DownloadFailed] * 2
    assert "a.bin did not arrive as announced" in str(errors[0])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.bin").write_bytes(b"mine")
    with Server(lists({"a.bin": CONTENT})) as server:
        [error, _] = both(lambda client: client.download(JOB_ID, tmp_path), server.url)
    assert "is there with other content" in str(error)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_a_body_that_goes_on_beyond_what_was_announced_is_not_written(tmp_path: Path) -> None:
    written: list[int] = []

    def goes_on(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(ConnectionError):
            for _ in range(1000):
                handler.wfile.write(CONTENT)
                written.append(len(CONTENT))
        handler.close_connection = True

    with Server(*[lists({"a.bin": CONTENT}), goes_on] * 2) as server:
        errors = both(lambda client: client.download(JOB_ID, tmp_path), server.url)
    assert [type(error) for error in errors] == [DownloadFailed] * 2
    assert len(written) < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_host_is_not_asked_for_with_the_key(tmp_path: Path) -> None:
    with Server(sends(200, CONTENT)) as other:
        entry = {"name": "a", "bytes": 1, "sha256": sha256(b"x"), "media_type": "", "href": f"{other.url}/a"}
        with Server(sends(200, {"files": [entry], "archive": "/archive"})) as server:
            errors = both(lambda client: client.download(JOB_ID, tmp_path), server.url, api_key="mm_mine")
        assert [type(error) for error in errors] == [DownloadFailed] * 2
        assert "no path of the service" in str(errors[0])
        assert other.asked == []


@pytest.mark.parametrize("number", ["x", "", "1_0", "²", "9" * 5000])
def test_an_event_whose_number_is_none_is_no_event_of_the_service(number: str) -> None:
    for event, data in (("status", STATUS % "queued"), ("news", "{}")):
        content = f"id: {number}\nevent: {event}\ndata: {data}\n\n".encode()
        with Server(sends(200, content, "text/event-stream")) as server:
            errors = both(lambda client: client.events(JOB_ID), server.url)
        assert [type(error) for error in errors] == [NoService] * 2
        assert "has the number" in str(errors[0])
        assert len(str(errors[0])) < 500


@pytest.mark.parametrize("name", ["../a", "/etc/a", "x/../../a", "", "."])
def test_no_file_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    with Server(lists({name: b"x"})) as server:
        errors = both(lambda client: client.download(JOB_ID, tmp_path / "folder"), server.url)
        assert len(server.asked) == 2
    assert [type(error) for error in errors] == [DownloadFailed] * 2
    assert "would lie outside" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"a/model.safetensors": b"w", "b/model.safetensors": b"w", "a/config.json": b"{}", "b/config.json": b"{}"}
    answers = [lists({**same, "empty.txt": b""}), sends(200, b"w"), sends(200, b"{}"), sends(200, b"")]
    with Server(*answers) as server, Client(server.url) as client:
        client.download(JOB_ID, tmp_path / "one")
        assert [path for _, path, _, _ in server.asked][1:] == ["/a/model.safetensors", "/a/config.json", "/empty.txt"]
    assert {name: (tmp_path / "one" / name).read_bytes() for name in same} == same
    assert (tmp_path / "one/a/model.safetensors").samefile(tmp_path / "one/b/model.safetensors")
    assert not (tmp_path / "one/a/config.json").samefile(tmp_path / "one/b/config.json")

    def has_no_links(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", has_no_links)
    with Server(*answers) as server, Client(server.url) as client:
        client.download(JOB_ID, tmp_path / "two")
    assert {name: (tmp_path / "two" / name).read_bytes() for name in same} == same


def test_a_cut_archive_gets_no_name(tmp_path: Path) -> None:
    with Server(*[cuts(CONTENT, 1000)] * 2, sends(200, CONTENT)) as server:
        errors = both(lambda client: client.archive(JOB_ID, tmp_path / "all.tar"), server.url)
        assert [type(error) for error in errors] == [Unreachable] * 2
        assert list(tmp_path.iterdir()) == []
        assert both(lambda client: client.archive(JOB_ID, tmp_path / "all.tar"), server.url) == [None, None]
    assert (tmp_path / "all.tar").read_bytes() == CONTENT


def test_a_reader_that_stops_closes_the_connection() -> None:
    closed = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(f"id: 1\nevent: status\ndata: {STATUS % 'queued'}\n\n".encode())
                time.sleep(0.01)
        closed.set()

    with Server(endless) as server, Client(server.url) as client:
        events = client.events(JOB_ID)
        assert next(events).id == 1
        events.close()  # type: ignore[attr-defined] # it is a generator
        assert closed.wait(10)
