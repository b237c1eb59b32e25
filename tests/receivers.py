"""Receivers of webhooks, on loopback: real HTTP servers that answer as a test says."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.conftest import HANGS_S


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


Behaviour = Callable[["Handler"], None]


class Receiver(ThreadingHTTPServer):
    """Keeps what it receives, and answers as its behaviours say, one after the other; the last one goes on."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, *behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.behaviours = list(behaviours) or [answering(204)]
        self.received: list[Received] = []
        self.let_go = threading.Event()
        """Ends whatever stalls."""
        self._lock = threading.Lock()
        self.port = int(self.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/hook?token=hidden-word"

    def take(self, received: Received) -> Behaviour:
        with self._lock:
            self.received.append(received)
            return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no fault of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Receiver
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.take(Received(self.path, dict(self.headers.items()), body))(self)

    do_GET = do_POST  # noqa: N815 - http.server's name for it; a redirect may be followed by a GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


def answering(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if status not in (204, 304):
            handler.wfile.write(body)

    return answer


def stalling(handler: Handler) -> None:
    """Answers nothing until it is let go."""
    handler.server.let_go.wait(HANGS_S)


def dripping(handler: Handler) -> None:
    """Sends the headers of an answer a byte at a time, without end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    with suppress(OSError):
        while not handler.server.let_go.wait(0.02):
            handler.wfile.write(b"a")


def endless(handler: Handler) -> None:
    """Sends a body without end."""
    handler.send_response(200)
    handler.end_headers()
    with suppress(OSError):
        while not handler.server.let_go.is_set():
            handler.wfile.write(b"a" * 65_536)


def stalling_in_its_body(handler: Handler) -> None:
    """Sends a status, and no more of the body that it promises until it is let go."""
    answering(200, Content_Length="10")(handler)
    handler.wfile.flush()
    stalling(handler)


def closing(handler: Handler) -> None:
    """Closes the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def nonsense(handler: Handler) -> None:
    """Answers something that is not HTTP."""
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n\r\n")
    handler.close_connection = True


@contextmanager
def receiving(*behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(*behaviours, tls=tls)
    thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.let_go.set()
        receiver.shutdown()
        thread.join()
        receiver.server_close()
