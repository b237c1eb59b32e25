"""The bytes that jobs take: those of artifacts, and those that waiting and running jobs are going to write."""

from typing import Any, cast

from redis import Redis

from app.contracts.limits import NoRoom, QueueFull, StorageFull, TenantLimits
from app.storage.keys import Keys


class Usage:
    """Counts bytes by tenant. It raises redis exceptions when Redis is away.

    What jobs are going to write is counted by the scripts that make them wait and that end them, and artifacts by those
    that end and delete jobs. Uploads are counted where they lie, see `TenantUploads.stored_bytes`.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def of(self, tenant: str) -> int:
        """Return the bytes of a tenant's artifacts, with those that its waiting and running jobs are going to write."""
        found = [self._redis.hget(name, tenant) for name in (self._keys.stored, self._keys.reserved)]
        return sum(int(cast(str | None, count) or 0) for count in found)

    def reserved(self) -> int:
        """Return the number of bytes that all waiting and running jobs are going to write."""
        return sum(map(int, cast(list[str], self._redis.hvals(self._keys.reserved))))


def refusal(found: Any, limits: TenantLimits, tenant: str, wanted: int, room: int | None) -> Exception:
    """Return the exception for what a script says with `refusal` of `queue.lua`."""
    kind, used = str(found[0]), int(found[1])
    own = limits.of(tenant)
    if kind == "queue":
        return QueueFull(own.queued_jobs or 0, used)
    if kind == "storage":
        return StorageFull(own.stored_bytes or 0, used, wanted)
    return NoRoom(wanted, used, room or 0)


def as_arguments(*limits: int | None) -> list[int | str]:
    """Return limits as scripts take them."""
    return ["" if limit is None else limit for limit in limits]
