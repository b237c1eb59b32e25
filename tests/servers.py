"""Servers that answer as they are told, as the service and what is before it may."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from app.client import Job, Status
from app.contracts.jobs import JobKind
from tests.conftest import RESULT

JOB_ID = "0" * 28
STATUS = '{"status": "%s", "attempt": 1, "error": null, "at": "2030-01-01T00:00:00Z"}'
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Gives one prepared answer after the other, the last one again and again, and keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        server = self
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.asked.append((self.command, self.path, headers, body))
                (left.pop(0) if len(left) > 1 else left[0])(self)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - names that http.server calls

            def log_message(self, format: str, *arguments: object) -> None:
                """Keep the output of the tests free of requests."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._http.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def sends(status: int, body: Any = None, kind: str = "application/json", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def refuses(status: int, code: str, detail: str = "no", errors: Any = (), **headers: str) -> Answer:
    problem = {"type": "about:blank", "title": "", "status": status, "code": code, "detail": detail, "instance": "/"}
    return sends(status, {**problem, "errors": list(errors), "new": 1}, "application/problem+json", **headers)


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def cuts(body: bytes, at: int, **headers: str) -> Answer:
    """Promise the whole body, and break off after some bytes of it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:at])
        handler.close_connection = True

    return answer


def job_body(**changed: Any) -> dict[str, Any]:
    """A job as a newer service may tell of it, with fields that this client does not know."""
    links = dict.fromkeys(("self", "events", "artifacts", "cancel", "report"), "/")
    job = Job(
        id=JOB_ID, kind=JobKind.MERGE, name="", status=Status.QUEUED, priority=0, attempt=0,
        created_at="2030-01-01T00:00:00Z",
        started_at=None, finished_at=None, expires_at=None, progress={}, error=None, labels={}, key=None, links=links,
        request={}, result=RESULT,
    ).model_dump(mode="json")  # fmt: skip
    job["result"]["timings"]["tea_seconds"] = 1.0
    return {**job, "colour": 3, **changed}
