"""Sends one message to one receiver, to a public address alone, and says how it went.

It uses httpcore, as httpx does, because there a name becomes an address: what it resolves to is checked, and the
connection goes to just that address. So a name that resolves to something else a moment later gains nothing. TLS still
asks for the name, and checks the certificate against it. Proxies of the environment are not used, and redirects are not
followed.
"""

import asyncio
import math
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version

import httpcore
from anyio import CapacityLimiter
from anyio.to_thread import run_sync

from app.contracts.addresses import literal_refusal, refusal

MOST_BODY_BYTES = 16_384  # of an answer, whose status alone counts
DRAIN_S = 1.0  # time for reading it
CONNECT_S = 5.0  # for each address of a name
MOST_RESOLVING = 64  # names at once; each has a thread, for up to half a minute where the name's servers hang

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a name. Raises OSError when there are none."""


class AddressRefused(Exception):
    """A receiver's name has no address, or one that is not public; which of these is not told."""


FAILURES = (
    AddressRefused,
    OSError,
    UnicodeError,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
)


@dataclass(frozen=True)
class Answer:
    """How one attempt went."""

    seconds: float
    status: int | None = None
    """Status of the answer; None when none came."""
    error: str | None = None
    """Why the attempt failed; None when it succeeded."""
    retry_after_s: float | None = None
    """Time that the receiver asks to be left alone for."""

    @property
    def is_gone(self) -> bool:
        """Whether the receiver wants nothing more."""
        return self.status == 410


class Sender:
    """Posts messages.

    Args:
        allow_private: whether addresses that are not public are allowed.
        timeout_s: time that an attempt has in all, from the name's resolution to the answer's body.
        resolve: how names are resolved; by default as the operating system does.
        tls: settings of TLS; by default certificates are checked against the system's authorities.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        timeout_s: float,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._backend = _CheckedBackend(allow_private, resolve or Resolver())
        self._tls = tls or ssl.create_default_context()
        self._agent = f"maskmerge/{version('maskmerge')}"

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Post a message once. Whatever goes wrong is said in the answer, without the URL's path and query."""
        began, error = time.monotonic(), None
        heard: list[tuple[int, float | None]] = []
        try:
            async with asyncio.timeout(self._timeout_s) as limit, self._posted(url, headers, body) as response:
                heard.append((response.status, _retry_after(response.status, response.headers)))
                # The status is known, so nothing that goes wrong from here on matters.
                limit.reschedule(asyncio.get_running_loop().time() + DRAIN_S)
                await _drain(response)
        except TimeoutError:
            error = f"no answer came within {self._timeout_s:g} s"
        except FAILURES as failure:
            error = _reason(failure)
        seconds = time.monotonic() - began
        if not heard:
            return Answer(seconds, error=error)
        [(status, retry_after)] = heard
        return Answer(seconds, status, _refused(status), retry_after)

    @asynccontextmanager
    async def _posted(self, url: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[httpcore.Response]:
        sent = {"Content-Type": "application/json", "User-Agent": self._agent, "Connection": "close", **headers}
        options = {"timeout": {"connect": CONNECT_S, "read": self._timeout_s, "write": self._timeout_s}}
        async with (
            httpcore.AsyncConnectionPool(
                self._tls, max_connections=1, max_keepalive_connections=0, network_backend=self._backend
            ) as connection,
            connection.stream("POST", url, headers=list(sent.items()), content=body, extensions=options) as response,
        ):
            yield response


async def _drain(response: httpcore.Response) -> None:
    """Read an answer's body, up to a limit, so that a receiver that writes one does not see its connection break."""
    size = 0
    async for chunk in response.aiter_stream():
        size += len(chunk)
        if size > MOST_BODY_BYTES:
            return


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to addresses that were checked."""

    def __init__(self, allow_private: bool, resolve: Resolve) -> None:
        self._inner = httpcore.AnyIOBackend()
        self._allow_private = allow_private
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._allowed(host, port)
        failure: Exception = OSError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _allowed(self, host: str, port: int) -> list[str]:
        """Return the addresses of a name. Raises AddressRefused, and OSError and UnicodeError where all are allowed."""
        if self._allow_private:
            return await self._resolve(host, port)
        kind = literal_refusal(host)
        if kind is not None:
            raise AddressRefused(f"{host} is {kind}, and webhooks are sent to public addresses alone")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        # Neither addresses are told nor whether there are any, so that nobody can ask which inner names there are.
        if not addresses or any(map(refusal, addresses)):
            raise AddressRefused(
                f"{host} has no public address: it cannot be resolved, or has addresses that are not public, and "
                "webhooks are sent to public ones alone"
            )
        return addresses


class Resolver:
    """Resolves names as the operating system does. Those that wait for it hold none of the API's threads."""

    def __init__(self) -> None:
        self._limit: CapacityLimiter | None = None

    async def __call__(self, host: str, port: int) -> list[str]:
        self._limit = self._limit or CapacityLimiter(MOST_RESOLVING)
        look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await run_sync(look, abandon_on_cancel=True, limiter=self._limit)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _reason(failure: Exception) -> str:
    """Say in a sentence why no answer came."""
    if isinstance(failure, AddressRefused):
        return str(failure)
    if isinstance(failure, socket.gaierror | UnicodeError):
        return "the receiver's name cannot be resolved"
    if isinstance(failure, httpcore.TimeoutException):
        return f"no connection was made within {CONNECT_S:g} s"
    if isinstance(failure, httpcore.RemoteProtocolError):
        return f"the receiver did not answer as HTTP/1.1 asks: {str(failure)[:200]}"
    if isinstance(failure, httpcore.ConnectError | OSError):
        return f"the receiver cannot be reached: {str(failure)[:200]}"
    return "the connection broke before an answer came"


def _refused(status: int) -> str | None:
    """Say why an answer does not count as a success; None when it does."""
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"the receiver answered {status}, a redirect, and redirects are not followed; name the final URL"
    if status == 410:
        return "the receiver answered 410, that it is gone for good"
    return f"the receiver answered {status}"


def _retry_after(status: int, headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """Return the seconds that `Retry-After` of a 429 or 503 asks for; None where it asks for nothing."""
    text = next((value.decode("latin-1") for name, value in headers if name.lower() == b"retry-after"), None)
    if status not in (429, 503) or text is None:
        return None
    try:
        seconds = float(text) if text.isascii() and text.isdigit() else _until(parsedate_to_datetime(text))
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(time_named: datetime) -> float:
    aware = time_named if time_named.tzinfo else time_named.replace(tzinfo=UTC)
    return (aware - datetime.now(UTC)).total_seconds()
