"""The bytes that tenants take: those that are stored for them, and those that their jobs are going to write."""

from typing import Any, cast

from redis import Redis

from app.contracts.limits import NoRoom, QueueFull, StorageFull, TenantLimits
from app.storage.keys import Keys
from app.storage.scripts import JobScripts


class Usage:
    """Counts bytes by tenant. It raises redis exceptions when Redis is away.

    What jobs are going to write is counted by the scripts that make them wait and that end them, and artifacts by those
    that end and delete jobs.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys, scripts: JobScripts, limits: TenantLimits) -> None:
        self._redis = redis
        self._keys = keys
        self._scripts = scripts
        self._limits = limits

    def add(self, tenant: str, count: int, room: int | None = None) -> None:
        """Count bytes that are going to be stored for a tenant, or give back as many as `count` is below 0.

        Args:
            room: bytes that the disk has left for these and for all jobs that wait and run; None: enough.

        Raises:
            StorageFull: the tenant may not have as many; nothing is counted then.
            NoRoom: the disk has not as many; nothing is counted then.
        """
        most = self._limits.of(tenant).stored_bytes
        refused = self._scripts.run("store", "", [], [tenant, count, *as_arguments(most, room)])
        if refused:
            raise refusal(refused, self._limits, tenant, count, room)

    def stored(self, tenant: str) -> int:
        """Return the number of bytes that are stored for a tenant."""
        return int(cast(str | None, self._redis.hget(self._keys.stored, tenant)) or 0)

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
