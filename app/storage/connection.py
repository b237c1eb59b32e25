"""Connections to Redis, with the patience that each side needs."""

import time
from typing import Any

from redis import Redis, asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry

ANSWER_S = 1.5  # callers of the API hear within 2 s that Redis does not answer
HUNG_S = 1.0  # time for which nobody else waits after that


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
    return ImpatientRedis.from_url(url, decode_responses=True, **_impatience())


def connect_for_dispatching(url: str) -> "Redis":
    """Make such a client for RQ in the API; it does not decode responses."""
    return ImpatientRedis.from_url(url, **_impatience())


def _impatience() -> dict[str, Any]:
    return {
        "socket_timeout": ANSWER_S,
        "socket_connect_timeout": ANSWER_S,
        "retry": Retry(ExponentialBackoff(cap=0.1, base=0.05), 2, (ConnectionError, BusyLoadingError)),
    }


def connect(url: str, *, patience: int, timeout_s: float = 5) -> "Redis":
    """Make a worker's client. It retries a lost connection `patience` times, at most 1 s apart, to outlast restarts."""
    return Redis.from_url(
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
    return Redis.from_url(url, socket_connect_timeout=5, health_check_interval=15)


def connect_for_watching(url: str, *, most: int, longest_wait_s: float) -> "asyncio.Redis":
    """Make a client for calls that wait. At most `most` wait at once, and others take turns with them.

    It outlasts a restart of Redis, because those who wait are in no hurry.
    """
    pool: asyncio.BlockingConnectionPool = asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=most,
        timeout=None,
        decode_responses=True,
        socket_timeout=longest_wait_s + 5,
        socket_connect_timeout=5,
        retry=AsyncRetry(ExponentialBackoff(cap=1, base=0.05), 10),  # 6 s in all
        retry_on_error=[ConnectionError, TimeoutError, BusyLoadingError],
    )
    return asyncio.Redis.from_pool(pool)
