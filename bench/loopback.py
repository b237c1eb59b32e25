"""Plain HTTP over loopback, for benches: a client library takes longer than the service that is measured."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

CHUNK_BYTES = 1 << 20


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    """Seconds from the first byte that was sent to the last that was read."""


class Connection:
    """A connection that is kept over many requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader = reader
        self._writer = writer
        self._key = key

    @classmethod
    async def open(cls, port: int, key: str) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port), key)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Send a request, and return its whole answer, which must say how long it is."""
        start = time.perf_counter()
        status, headers = await self.begin(method, path, body)
        content = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(status, headers, content, time.perf_counter() - start)

    async def begin(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str]]:
        """Send a request, and return the answer's status and headers."""
        self._writer.write(request(method, path, self._key, body))
        return parsed(await self._reader.readuntil(b"\r\n\r\n"))

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines of the answer's body as they come."""
        while line := await self._reader.readline():
            yield line

    def close(self) -> None:
        self._writer.close()


def request(method: str, path: str, key: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


@dataclass
class Load:
    """Seconds that each request took."""

    seconds: list[float] = field(default_factory=list)

    def percentile_ms(self, percent: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def repeated(
    ask: Callable[[], Awaitable[Answer]], every_s: float, first_s: float, until: float, load: Load
) -> None:
    """Ask again and again, every so many seconds of the clock. One that is late is sent at once.

    Raises RuntimeError: a request was not answered as it should be.
    """
    due = time.perf_counter() + first_s
    while due < until:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        answer = await ask()
        if answer.status not in (200, 202):
            raise RuntimeError(f"{answer.status}: {answer.body[:1000].decode()}")
        load.seconds.append(answer.seconds)
        due += every_s


def received(stream: socket.socket, into: Callable[[memoryview], object] | None = None, most: int | None = None) -> int:
    """Read a socket to its end, or to so many bytes, and return how many there were."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total = 0
    while most is None or total < most:
        wanted = len(buffer) if most is None else min(len(buffer), most - total)
        count = stream.recv_into(buffer, wanted)
        if count == 0:
            break
        if into is not None:
            into(buffer[:count])
        total += count
    return total


def head_of(stream: socket.socket) -> tuple[int, dict[str, str]]:
    """Read an answer's head from a socket, and nothing after it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        if not byte:
            raise RuntimeError(f"the connection ended within the answer's head: {head!r}")
        head += byte
    return parsed(head)


def spread(count: int, every_s: float) -> Sequence[float]:
    """Return when each of so many clients begins, so that their requests are spread evenly."""
    return [index * every_s / count for index in range(count)]
