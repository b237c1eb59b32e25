"""Connections to Redis, with the patience that each side needs."""

from redis import Redis, asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry


def connect(url: str, *, patience: int, timeout_s: float = 5) -> "Redis":
    """A client that retries a lost connection `patience` times, at most 1 s apart.

    The API asks for little, so that it can answer 503 soon; a worker for much, so that it outlasts a restart.
    """
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
    """RQ keeps bytes and blocks longer than any read timeout; it has its own retries."""
    return Redis.from_url(url, socket_connect_timeout=5, health_check_interval=15)


def connect_for_watching(url: str, *, most: int, longest_wait_s: float) -> "asyncio.Redis":
    """A client for calls that wait; when `most` are at it, others take turns with them.

    It outlasts a restart of Redis, since those who wait are in no hurry.
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
