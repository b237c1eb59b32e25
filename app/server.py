"""The API's server."""

import asyncio
import json
import logging
import os
import resource
import select
import socket
import sys
from contextlib import ExitStack, suppress
from functools import cache, partial
from typing import Any, cast

import h11
import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from redis.exceptions import RedisError
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.body_limit import is_upload
from app.contracts.errors import MEDIA_TYPE, Problem, ProblemError
from app.contracts.settings import Settings
from app.main import create_app
from app.observability.context import new_request_id
from app.storage.versions import NewerData
from app.tls import Certificate

MOST_CONNECTIONS = 1000
MOST_HEADER_BYTES = 16_384  # counted for each request, with its first line
RENEWING_BYTES = 1_000_000
HANDSHAKE_S = 5.0  # clients are not counted before it is over, and every one of them holds an open file
OTHER_FILES = 400  # those that the process may have open beside its clients' connections, most of them to Redis
SENT_BYTES = 32 << 20  # of a file, by a thread, before it turns to another
SENDERS = 8  # threads that send files, so that others stay free to answer
PATIENCE_MS = 20  # for which a thread waits for a reader
RENEWAL_TICKS = 600  # a certificate is looked at once a minute; uvicorn ticks ten times a second
FILES = 2 * MOST_CONNECTIONS + OTHER_FILES  # a connection is a file, and so is its download


logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Ends event streams and long waits before it stops; uvicorn would wait for them, then cut them off.

    It speaks TLS where the settings name a certificate, and takes up a new one without a restart.

    Raises ValueError or OSError when the app cannot be made, and NewerData when a newer release has written the data.
    """

    def __init__(self, settings: Settings) -> None:
        certificate = Certificate.of(settings)
        app = create_app(settings)
        services = app.state.services
        self._upgrade = services.upgrade
        try:
            with suppress(RedisError):  # while Redis is away, so is the answer to who has a key
                self._upgrade.run()
                if self._upgrade.refused is not None:
                    raise self._upgrade.refused
                services.api_keys.require(settings)
        finally:
            services.close()  # a server that does not run holds no connection; one that runs opens others
        self._watcher = services.watcher
        self._certificate = certificate
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if allowed < FILES:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (FILES if most == resource.RLIM_INFINITY else min(FILES, most), most)
            )
        connection: Any = partial(Connection, request_s=settings.request_seconds)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=connection,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                ws="none",
                ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
                proxy_headers=False,  # `app.api.proxies` reads them, and `Forwarded` too
                log_config=None,  # its lines are written as all others are
                log_level=settings.log_level.lower(),
                access_log=False,
                timeout_graceful_shutdown=5,  # a download in progress does not keep the service from stopping
            )
        )

    @property
    def found_newer_data(self) -> NewerData | None:
        """Why the server has ended, if Redis was away at first and then had what a newer release has written."""
        refused: NewerData | None = self._upgrade.refused
        return refused

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. A client that is slow to agree on TLS has no place among the connections yet, and is cut off soon."""
        if self._certificate is not None:
            loop: Any = asyncio.get_running_loop()
            # uvicorn has no setting for it, and asyncio would wait for a minute.
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_S)
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and counter % RENEWAL_TICKS == 0:
            self._certificate.renew()
        return await super().on_tick(counter) or self._upgrade.refused is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.stop()
        await super().shutdown(sockets)


class OneLength(h11.Connection):
    """HTTP/1.1, in which a request says the length of its body in one way.

    A proxy before the service may take the other way, and then another part of the bytes for the next request (RFC
    9112, 6.1). h11 reads such requests, and keeps the connection.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("it has both Transfer-Encoding and Content-Length")
            if b"transfer-encoding" in names and event.http_version < b"1.1":
                raise h11.RemoteProtocolError("it has Transfer-Encoding, which HTTP/1.0 does not know")
        return event


class Connection(H11Protocol):
    """A client's connection. It is cut off when a request does not arrive whole in time; uvicorn would wait for ever.

    The number of connections is limited: a new one takes the place of the one whose request is awaited longest.
    An answer that is under way is never cut off, however slowly its reader reads. A whole file goes from the kernel's
    cache to the socket without a copy, unless the connection speaks TLS.

    Args:
        request_s: seconds from a request's first byte to its last; of an upload, for each megabyte.
    """

    def __init__(self, *args: Any, request_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._request_s = request_s
        self._deadline: asyncio.TimerHandle | None = None  # while a request is awaited or arrives
        self._received = 0  # bytes of an upload since its time was renewed
        self.conn = OneLength(h11.SERVER, MOST_HEADER_BYTES)
        self._answered_by: Any = self.app
        self.app = self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > _most_connections():
            waiting = [other for other in self.connections if isinstance(other, Connection) and other.is_waiting]
            oldest = min(waiting, key=lambda other: other._deadline.when() if other._deadline else 0)
            detail = "all connections are taken; try again"
            error = ProblemError(Problem.TOO_BUSY, detail, None, **{"Retry-After": "1"})
            oldest._close(error, is_asked=oldest is self)

    @property
    def is_waiting(self) -> bool:
        """Whether a request is awaited or arriving, and no part of an answer was sent."""
        return self._deadline is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._await_request()
        super().data_received(data)
        self._go_on_waiting(len(data))

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._deadline is None:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed request; uvicorn calls it for h11's errors, and its own answer is plain text."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            problem = f"the request's line and headers have more than {MOST_HEADER_BYTES} bytes"
            self._close(ProblemError(Problem.HEADERS_TOO_LARGE, problem))
        else:
            self._close(ProblemError(Problem.MALFORMED, f"the request is not HTTP as it is taken here: {error}"))

    def _go_on_waiting(self, received: int) -> None:
        """Give an upload, which may be large, the whole time again for each megabyte of it."""
        if self.conn.their_state is not h11.SEND_BODY or self._deadline is None or not is_upload(self.scope):
            self._received = 0
            return
        self._received += received
        if self._received >= RENEWING_BYTES:
            self._received = 0
            self._await_request()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request. The app may leave it to this class to send a file, as ASGI's `pathsend` has it."""

        async def send_any(message: Any) -> None:
            if message["type"] == "http.response.pathsend":
                if not await self._send_file(message["path"]):
                    return
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        if self.transport.get_extra_info("sslcontext") is None:
            scope = {**scope, "extensions": {**scope.get("extensions", {}), "http.response.pathsend": {}}}
        await self._answered_by(scope, receive, send_any)

    async def _send_file(self, path: str) -> bool:
        """Send a file as the answer's whole body. Returns False when the reader has gone, or the file became shorter.

        Threads send it, because it may come from a slow disk. While the reader is slow, none waits for it.
        """
        with ExitStack() as opened:
            file = opened.enter_context(await run_sync(open, path, "rb"))
            size = os.fstat(file.fileno()).st_size
            self.conn.send_with_data_passthrough(h11.Data(data=cast(Any, range(size))))  # what counts is its length
            # A descriptor of our own, because the event loop lets nobody else wait for the transport's.
            out = os.dup(self.transport.get_extra_info("socket").fileno())
            opened.callback(os.close, out)
            sent = 0
            try:
                while sent < size:
                    await self._until_writable(out)
                    if self.transport.is_closing():
                        raise ConnectionAbortedError
                    part = (out, file.fileno(), sent, min(sent + SENT_BYTES, size))
                    sent += await run_sync(_send, *part, limiter=_senders())
            except (OSError, EOFError):
                if self.cycle is not None:
                    self.cycle.disconnected = True
                self.transport.abort()
                return False
        return True

    async def _until_writable(self, descriptor: int) -> None:
        """Return when the socket takes more, and what was written before, such as headers, has gone."""
        while not self.transport.is_closing():
            is_ready = asyncio.Event()
            self.loop.add_writer(descriptor, is_ready.set)
            try:
                await is_ready.wait()
            finally:
                self.loop.remove_writer(descriptor)
            if self.transport.get_write_buffer_size() == 0:
                return
            await asyncio.sleep(0)

    def _await_request(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self._request_s, self._cut_off)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut_off(self) -> None:
        detail = f"the request did not arrive within {self._request_s:g} seconds"
        self._close(ProblemError(Problem.REQUEST_TIMEOUT, detail))

    def _close(self, error: ProblemError, *, is_asked: bool = False) -> None:
        """Close the connection, and say why unless nothing was asked or an answer has begun."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        is_asked = is_asked or self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
        if not is_asked:
            self.transport.close()
        elif self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = new_request_id()
            logger.info("%s, request_id=%s", error.detail, request_id)
            body = json.dumps(error.body("", request_id)).encode()
            headers = {
                "Content-Type": MEDIA_TYPE,
                "Content-Length": str(len(body)),
                "Connection": "close",
                "X-Request-ID": request_id,
                **error.headers,
            }
            start = h11.Response(status_code=error.problem.status, headers=list(headers.items()), reason=b"")
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:  # the app, which waits for the rest of the body, hears that it will not come
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()
        else:
            self.transport.abort()


def _send(out: int, file: int, start: int, end: int) -> int:
    """Send this part of a file, or as much of it as the reader takes without delay, and return its length.

    Raises OSError when the reader has gone, and EOFError when the file ends before.
    """
    position = start
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    while position < end:
        try:
            sent = os.sendfile(out, file, position, end - position)
        except BlockingIOError:
            if not poll.poll(PATIENCE_MS):
                break
            continue
        if sent == 0:
            raise EOFError
        position += sent
    return position - start


@cache
def _senders() -> CapacityLimiter:
    return CapacityLimiter(SENDERS)


def _most_connections() -> int:
    """Return how many connections the limit of open files allows."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(MOST_CONNECTIONS, (allowed - OTHER_FILES) // 2))
