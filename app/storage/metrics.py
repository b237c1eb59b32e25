"""Sums in Redis that only grow: what happened to all jobs since there is this Redis."""

from typing import cast

from redis import Redis

from app.observability.metrics import Count
from app.storage.keys import Keys


class Sums:
    """Adds to sums and reads them. It raises redis exceptions when Redis is away.

    What happens to a job is not added here but by the script that makes it happen, see `prelude.lua`.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def add(self, *counts: Count) -> None:
        for name, by in counts:
            self._redis.hincrbyfloat(self._keys.sums, name, by)

    def read(self) -> dict[str, float]:
        """Return every sum by its name: that of the metric, followed by the values of its labels."""
        found = cast(dict[str, str], self._redis.hgetall(self._keys.sums))
        return {name: float(value) for name, value in found.items()}
