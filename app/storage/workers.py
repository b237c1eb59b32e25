"""Workers that are alive, as they say themselves."""

from typing import cast

from redis import Redis

from app.contracts.devices import DEVICES, Device
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

    def beat(self, worker: str, seconds: float, device: Device = "cpu") -> None:
        """Note that a worker is alive for the next `seconds`, and computes on a device."""
        now = self._clock()
        with self._redis.pipeline() as writes:
            for workers in (self._keys.workers, self._keys.workers_with(device)):
                writes.zremrangebyscore(workers, "-inf", now)
                writes.zadd(workers, {worker: now + int(seconds * 1000)})
            writes.execute()

    def sign_off(self, worker: str) -> None:
        """Note that a worker ends."""
        with self._redis.pipeline() as writes:
            for workers in (self._keys.workers, *map(self._keys.workers_with, DEVICES)):
                writes.zrem(workers, worker)
            writes.execute()

    def count(self, device: Device | None = None) -> int:
        """Return the number of live workers, or of those of them that compute on a device."""
        workers = self._keys.workers if device is None else self._keys.workers_with(device)
        return int(self._redis.zcount(workers, self._clock(), "+inf"))

    def lacking_for(self, device: Device | None) -> str | None:
        """Say which worker a job waits for that asks for a device, or for none; None where one is alive."""
        if self.count(device):
            return None
        if device is None:
            return "a worker; none is alive"
        return f"a worker with the device {device}; {'none has it' if self.count() else 'none is alive'}"

    def names(self) -> list[str]:
        return cast(list[str], self._redis.zrangebyscore(self._keys.workers, self._clock(), "+inf"))
