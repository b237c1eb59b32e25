"""Common settings of both clients' connections: address, key, and which requests are sent again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from httpx_retries import Retry
from httpx_sse import SSEError

from app.client.calls import REPEATABLE, Call
from app.client.errors import refusal, stranger, unreachable

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
RETRIES = 4
BACKOFF_S = 0.25  # the pauses between tries are about 0.25, 0.5, 1 and 2 s
LONGEST_PAUSE_S = 60.0  # a service that asks for a longer one is not asked again

Answer = TypeVar("Answer")


class AskedToWait(Exception):
    """The service asks for a longer pause than the client makes."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self.response = response


class Retries(Retry):
    """Tries again as `httpx-retries` does, but never earlier than the service asks for."""

    def sleep(self, response: httpx.Response | Exception) -> None:
        self._check(response)
        super().sleep(response)

    async def asleep(self, response: httpx.Response | Exception) -> None:
        self._check(response)
        await super().asleep(response)

    def _check(self, response: httpx.Response | Exception) -> None:
        asked = response.headers.get("Retry-After") if isinstance(response, httpx.Response) else None
        try:
            too_long = asked is not None and self.parse_retry_after(asked) > self.max_backoff_wait
        except ValueError:
            return
        if too_long and isinstance(response, httpx.Response):
            raise AskedToWait(response)


def retries(most: int) -> Retries:
    """Return how often and when a request is sent again."""
    methods = [*REPEATABLE, "POST"]  # `Call.is_repeatable` tells which POST
    return Retries(most, methods, backoff_factor=BACKOFF_S, backoff_jitter=0.5, max_backoff_wait=LONGEST_PAUSE_S)


def options(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of httpx's clients. What is not given is looked up in the environment."""
    key = os.environ.get("MASKMERGE_API_KEY") if api_key is None else api_key
    return {
        "base_url": os.environ.get("MASKMERGE_URL") or URL if url is None else url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "timeout": timeout_s,
    }


@contextmanager
def translated(response: httpx.Response | None = None) -> Iterator[None]:
    """Turn errors of httpx into those of the client; `response` is the one that is read."""
    try:
        yield
    except SSEError as error:
        if response is None:
            raise
        raise stranger(response) from error
    except httpx.RequestError as error:
        raise unreachable(error) from error


def answer(call: Call[Answer], response: httpx.Response) -> Answer:
    """Return what an answer says. Raises ClientError."""
    check(call, response)
    return call.read(response)


def check(call: Call[Any], response: httpx.Response) -> None:
    """Raise ClientError unless an answer is a success; its content must have been read if it is none."""
    retry = response.extensions.get("retry")
    if response.status_code == 404 and call.method == "DELETE" and retry is not None and retry.attempts_made:
        return  # an earlier try, whose answer was lost, has removed it
    if response.is_error:
        raise refusal(response)
    if not response.is_success:
        raise stranger(response)
