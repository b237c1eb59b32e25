"""The client, on a server that answers as the service may when a job takes long."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from app.client import Client, Event

ANSWERS = [
    b'id: 1\nevent: status\ndata: {"status": "queued"}\n\n: still here\n\n: and here\n\nid: 2\nevent: status\ndata: {"',
    b'id: 2\nevent: status\ndata: {"status": "succeeded"}\n\n',
]
"""The first is cut in the middle of its second event."""


class Stream(BaseHTTPRequestHandler):
    asked_after: list[str | None] = []  # noqa: RUF012 - it is emptied by the fixture

    def do_GET(self) -> None:
        after = self.headers.get("Last-Event-ID")
        Stream.asked_after.append(after)
        if after == "2":
            self.send_response(204)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(ANSWERS[0 if after is None else 1])

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the output of the tests free of requests."""


@pytest.fixture
def address() -> Iterator[str]:
    Stream.asked_after.clear()
    with HTTPServer(("127.0.0.1", 0), Stream) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_comments_that_keep_a_connection_alive_are_no_events_and_a_cut_loses_none(address: str) -> None:
    with Client(address) as client:
        found = list(client.events("0" * 28))
    assert found == [Event("1", "status", {"status": "queued"}), Event("2", "status", {"status": "succeeded"})]
    assert Stream.asked_after == [None, "1", "2"]
