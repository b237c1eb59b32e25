"""Workers that are alive, as they say themselves."""

from typing import cast

from redis import Redis

from app.storage.keys import Keys
from app.storage.scripts import Clock


class Workers:
    """Records which workers are alive. Raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys, clock: Clock) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock

    def beat(self, worker: str, seconds: float) -> None:
        """Note that a worker is alive for the next `seconds`."""
        now = self._clock()
        self._redis.zremrangebyscore(self._keys.workers, "-inf", now)
        self._redis.zadd(self._keys.workers, {worker: now + int(seconds * 1000)})

    def sign_off(self, worker: str) -> None:
        """Note that a worker ends."""
        self._redis.zrem(self._keys.workers, worker)

    def count(self) -> int:
        return int(self._redis.zcount(self._keys.workers, self._clock(), "+inf"))

    def names(self) -> list[str]:
        return cast(list[str], self._redis.zrangebyscore(self._keys.workers, self._clock(), "+inf"))
