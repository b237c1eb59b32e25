"""Clients that stall while they send are cut off, many of them take nothing from others, slow readers are served."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from redis import Redis

from app import server as server_module
from app.contracts.settings import Settings
from app.server import Server
from app.storage.artifacts.folder import FolderStore
from app.storage.jobs import JobStore
from tests.conftest import HANGS_S, RESULT, free_port, wait_until
from tests.integration.test_job_store import new_job

REQUEST_S = 0.5


@pytest.fixture
def port(redis: Redis, redis_url: str, tmp_path: Path) -> Iterator[int]:
    """Of a server in a thread of this process."""
    port = free_port()
    server = Server(
        Settings(redis_url=redis_url, queue="test", data_dir=tmp_path, port=port, request_seconds=REQUEST_S)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the server to listen")
    httpx.get(f"http://127.0.0.1:{port}/nowhere", timeout=HANGS_S)  # the first request makes all routes ready
    yield port
    server.should_exit = True
    thread.join(HANGS_S)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=HANGS_S)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/problem+json" in head
    assert b"Connection: close" in head
    return int(head.split()[1]), json.loads(body)["code"]


def trickled(connection: socket.socket) -> int:
    """How many bytes, ten in the time of a request, were sent until the connection was cut."""
    for sent in range(1000):
        try:
            connection.sendall(b"x")
        except OSError:
            return sent
        time.sleep(REQUEST_S / 10)
    pytest.fail("the connection was not cut")


HEAD = b"POST /merge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
STALLED = {
    "one letter": b"G",
    "headers without an end": HEAD,
    "a body that does not come": HEAD + b"Content-Length: 10\r\n\r\n",
    "half a body": HEAD + b"Content-Length: 10\r\n\r\n{",
    "a chunk without an end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    "chunks without a last": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    "a body that waits for the word": HEAD + b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("sent", STALLED.values(), ids=STALLED)
def test_a_request_that_stalls_is_cut_off_and_told_so(port: int, sent: bytes) -> None:
    with connected(port) as connection:
        before = time.monotonic()
        connection.sendall(sent)
        answer = rest(connection).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert time.monotonic() - before >= REQUEST_S
    assert code(answer) == (408, "request_timeout")


@pytest.mark.parametrize("start", [b"GET /healthz HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 100000\r\n\r\n"])
def test_a_request_that_trickles_has_no_more_time(port: int, start: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(start)
        assert 5 <= trickled(connection) <= 30


def test_a_body_that_trickles_after_its_answer_is_cut_off(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        assert trickled(connection) <= 30


def test_a_connection_without_a_request_is_closed_without_a_word(port: int) -> None:
    with connected(port) as connection:
        assert rest(connection) == b""
    with connected(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert rest(connection).count(b"HTTP/1.1") == 1


def test_requests_in_a_row_have_each_their_time(port: int) -> None:
    with connected(port) as connection:
        for _ in range(4):
            for part in (b"GET /healthz HTTP/1.1\r\n", b"Host: localhost\r\n\r\n"):
                connection.sendall(part)
                time.sleep(REQUEST_S / 2)
            received = b""
            while not received.endswith(b"}"):  # the body may come by itself
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")


def test_answers_that_take_long_are_not_cut_off(port: int, redis: Redis) -> None:
    store = JobStore(redis, "test", 10, 3)
    job_id = new_job(store).job
    url = f"http://127.0.0.1:{port}/jobs/{job_id}"

    def cancel() -> None:
        time.sleep(4 * REQUEST_S)
        store.records.cancel(job_id)

    ending = threading.Thread(target=cancel)
    ending.start()
    with httpx.Client(timeout=HANGS_S) as http, http.stream("GET", f"{url}/events") as events:
        waited = http.get(url, headers={"Prefer": "wait=60"})
        assert waited.json()["status"] == "cancelled"
        assert "cancelled" in events.read().decode()
    ending.join()


def test_a_reader_that_is_slow_gets_all(port: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(HANGS_S)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = connection.recv(1000)
        head, _, body = received.partition(b"\r\n\r\n")
        size = int(dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])[b"content-length"])
        assert size > 20_000
        while len(body) < size:
            time.sleep(2 * REQUEST_S * 4096 / size)
            chunk = connection.recv(4096)
            assert chunk, f"cut off after {len(body)} of {size} bytes"
            body += chunk


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 10\r\n\r\n{"])
def test_many_that_stall_take_nothing_from_others(port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 50)
    with ExitStack() as stack:
        for _ in range(3):
            for _ in range(100):
                connection = stack.enter_context(connected(port))
                try:
                    connection.sendall(sent)
                except OSError:
                    continue
            before = time.monotonic()
            assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=HANGS_S).status_code == 200
            assert time.monotonic() - before < 2


def test_a_connection_too_many_is_refused_where_all_others_are_at_work(
    port: int, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(redis, "test", 10, 3)
    job_id = new_job(store).job
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 5)
    with ExitStack() as stack:
        readers = [stack.enter_context(connected(port)) for _ in range(5)]
        for reader in readers:
            reader.sendall(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert reader.recv(65536).startswith(b"HTTP/1.1 200")
        with connected(port) as connection:
            assert code(rest(connection)) == (503, "too_busy")
        store.records.cancel(job_id)
        assert all(b"cancelled" in rest(reader) for reader in readers)
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200, "room")


NEXT = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"  # what a proxy may take for the body, or the body for it
MALFORMED = {
    "no HTTP": b"nonsense\r\n\r\n",
    "a line too many": b"\r\n\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "a header that goes on": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length below 0": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a broken chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + NEXT,
    "chunks of old": HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
}


@pytest.mark.parametrize("sent", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_is_refused_like_everything_else(port: int, sent: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(sent)
        answer = rest(connection)
    assert code(answer) == (400, "malformed")
    assert answer.count(b"HTTP/1.1 ") == 1  # nothing after it is read as a request


def test_headers_that_are_too_large_are_said_to_be(port: int) -> None:
    for sent in (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\nX: 1\r\n" * 9):
        with connected(port) as connection:
            connection.sendall(sent + b"x" * 20_000)
            assert code(rest(connection)) == (431, "headers_too_large")
    with connected(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000 + b"\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)


SIZE = 40_000_000


@pytest.fixture
def large_file(redis: Redis, tmp_path: Path) -> tuple[str, bytes]:
    """A file of an artifact: its path in the API, and its content."""
    content = b"".join(number.to_bytes(8, "little") for number in range(SIZE // 8))
    store, jobs = FolderStore(tmp_path), JobStore(redis, "test", lease_seconds=1000, max_losses=3)
    store.prepare()
    task = new_job(jobs)
    attempt = jobs.tasks.claim("worker")
    assert attempt is not None
    folder = store.begin(attempt)
    (folder / "large.bin").write_bytes(content)
    file = {"name": "large.bin", "bytes": SIZE, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": [file]}))
    assert jobs.tasks.succeed(attempt, RESULT, store.publish(attempt))
    return f"/jobs/{task.job}/artifacts/large.bin", content


def test_a_file_comes_whole_however_its_reader_reads(port: int, large_file: tuple[str, bytes]) -> None:
    path, content = large_file
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS_S) as client:
        for _ in range(2):  # on one connection
            assert client.get(path).content == content
        head = client.head(path)
        assert (head.content, head.headers["Content-Length"]) == (b"", str(SIZE))
        part = client.get(path, headers={"Range": f"bytes={SIZE - 5}-", "If-Range": head.headers["ETag"]})
        assert (part.status_code, part.content) == (206, content[-5:])
        pieces = []
        with connected(port) as slow:
            slow.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            for _ in range(12):  # longer than a request may take to arrive
                pieces.append(slow.recv(100_000))
                assert client.get("/healthz").status_code == 200
                time.sleep(0.1)
            while piece := slow.recv(1 << 20):
                pieces.append(piece)
        assert b"".join(pieces).partition(b"\r\n\r\n")[2] == content


def test_readers_who_leave_keep_nothing_open_and_nobody_waiting(port: int, large_file: tuple[str, bytes]) -> None:
    path, content = large_file
    asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()

    def descriptors() -> int:
        # psutil passes over a file that is closed while it lists.
        return sum(1 for file in psutil.Process().open_files() if file.path.endswith("large.bin"))

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANGS_S) as client:
        client.get(path)
        leaving = [connected(port) for _ in range(30)]
        for stream in leaving:
            stream.sendall(asked)
            assert stream.recv(1000).startswith(b"HTTP/1.1 200")
        stalled = descriptors()
        assert client.get(path).content == content, "those who do not read hold up nobody"
        for stream in leaving:
            stream.close()
        wait_until(lambda: descriptors() == 0, "files to be closed")
        assert stalled >= 30
        assert client.get("/healthz").status_code == 200
