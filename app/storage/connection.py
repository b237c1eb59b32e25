"""Connections to Redis, with the patience that each side needs."""

import time
from typing import Any, TypeVar, cast

from redis import ConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection, asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelManagedConnection

from app.storage.redis_address import RedisAddress

ANSWER_S = 1.5  # callers of the API hear within 2 s that Redis does not answer
HUNG_S = 1.0  # time for which nobody else waits after that
SENTINEL_S = 0.5  # the next of them is asked when one has not answered
SENTINEL_PATIENCE: dict[str, Any] = {"socket_timeout": SENTINEL_S, "socket_connect_timeout": SENTINEL_S}
NO_SERVER = "no process of Sentinel answers that knows a server of '{}' that takes writes"
ASYNC = {
    SSLConnection: asyncio.SSLConnection,
    UnixDomainSocketConnection: asyncio.UnixDomainSocketConnection,
}
"""Connections that do not block, for those that do."""

Client = TypeVar("Client", bound=Redis)


class ImpatientRedis(Redis):
    """A client that, once Redis has not answered in time, fails at once for a moment.

    Otherwise those who wait would hold all threads that answer, and the next in line would wait for them first.
    """

    _hung_until = 0.0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if time.monotonic() < self._hung_until:
            raise TimeoutError("Redis did not answer a moment ago")
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except TimeoutError:
            self._hung_until = time.monotonic() + HUNG_S
            raise


def connect_for_answers(url: str) -> "Redis":
    """Make the API's client. It tries again twice when it is refused, but not when Redis hangs."""
    return _client(ImpatientRedis, url, decode_responses=True, **_impatience())


def connect_for_dispatching(url: str) -> "Redis":
    """Make such a client for RQ in the API; it does not decode responses."""
    return _client(ImpatientRedis, url, **_impatience())


def _impatience() -> dict[str, Any]:
    return {
        "socket_timeout": ANSWER_S,
        "socket_connect_timeout": ANSWER_S,
        "retry": Retry(ExponentialBackoff(cap=0.1, base=0.05), 2, (ConnectionError, BusyLoadingError)),
    }


def connect(url: str, *, patience: int, timeout_s: float = 5) -> "Redis":
    """Make a worker's client. It retries a lost connection `patience` times, at most 1 s apart, to outlast restarts."""
    return _client(
        Redis,
        url,
        decode_responses=True,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=1, base=0.05), patience),
        retry_on_error=[ConnectionError, TimeoutError, BusyLoadingError],
    )


def connect_for_rq(url: str) -> "Redis":
    """Make RQ's client. RQ keeps bytes, blocks longer than any read timeout, and has its own retries."""
    return _client(Redis, url, socket_connect_timeout=5, health_check_interval=15)


def connect_for_watching(url: str, *, most: int, longest_wait_s: float) -> "asyncio.Redis":
    """Make a client for calls that wait. At most `most` wait at once, and others take turns with them.

    It outlasts a restart of Redis, because those who wait are in no hurry.
    """
    address = RedisAddress.parse(url)
    options: dict[str, Any] = {
        "max_connections": most,
        "timeout": None,
        "decode_responses": True,
        "socket_timeout": longest_wait_s + 5,
        "socket_connect_timeout": 5,
        "retry": AsyncRetry(ExponentialBackoff(cap=1, base=0.05), 10),  # 6 s in all
        "retry_on_error": [ConnectionError, TimeoutError, BusyLoadingError],
    }
    options |= address.options
    if "connection_class" in options:
        options["connection_class"] = ASYNC[options["connection_class"]]
    pool: asyncio.ConnectionPool
    if address.service is None:
        pool = asyncio.BlockingConnectionPool(**options)
    else:
        of_sentinel = SENTINEL_PATIENCE | address.sentinel_options
        sentinel = _AsyncWatch(address.sentinels, sentinel_kwargs=of_sentinel)  # type: ignore[no-untyped-call]
        pool = _WaitingSentinelPool(address.service, sentinel, **options)  # type: ignore[no-untyped-call]
    return asyncio.Redis.from_pool(pool)


class _WaitingSentinelPool(SentinelConnectionPool, asyncio.BlockingConnectionPool):
    """Connections to the server that Sentinel names; who finds none free waits for one."""

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def _client(kind: type[Client], url: str, **options: Any) -> Client:
    """Make a client of the server that a URL names, or of the one that takes writes where it names Sentinel.

    What the URL says goes before `options`. Raises ValueError where it is no URL of Redis.
    """
    address = RedisAddress.parse(url)
    options |= address.options
    if address.service is None:
        return cast(Client, kind.from_pool(ConnectionPool(**options)))
    of_sentinel = SENTINEL_PATIENCE | address.sentinel_options
    sentinel = _Watch(address.sentinels, sentinel_kwargs=of_sentinel)  # type: ignore[no-untyped-call]
    made = _SecuredSentinelConnection if options.pop("ssl", False) else _SentinelConnection
    client = sentinel.master_for(  # type: ignore[no-untyped-call]
        address.service, redis_class=kind, connection_class=made, **options
    )
    return cast(Client, client)


class _SentinelConnection(SentinelManagedConnection):
    """A connection that is closed when the wait for an answer is given up, as all others of redis-py are.

    Of its connections by Sentinel it keeps those, and the next command would get the answer that comes late.
    """

    def read_response(self, *args: Any, disconnect_on_error: bool | None = True, **options: Any) -> Any:
        return super().read_response(*args, disconnect_on_error=disconnect_on_error, **options)


class _SecuredSentinelConnection(_SentinelConnection, SSLConnection):
    pass


class _Watch(Sentinel):
    """Sentinel, in whose errors redis-py lists all options of connections."""

    def discover_master(self, service_name: str) -> Any:
        try:
            return super().discover_master(service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            raise MasterNotFoundError(NO_SERVER.format(service_name)) from None


class _AsyncWatch(AsyncSentinel):
    async def discover_master(self, service_name: str) -> Any:
        try:
            return await super().discover_master(service_name)
        except AsyncMasterNotFoundError:
            raise AsyncMasterNotFoundError(NO_SERVER.format(service_name)) from None
