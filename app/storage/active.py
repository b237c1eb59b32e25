"""What waiting and running jobs read, so that nobody removes it."""

import re
from collections.abc import Iterator
from typing import cast

from redis import Redis

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.devices import LANES
from app.contracts.jobs import TaskId
from app.storage.keys import Keys

READ_AT_ONCE = 500  # records of which one or two fields are read
UPLOAD_NAMED = re.compile(r'"upload:([0-9a-f]{64})"')
JOB_NAMED = re.compile(r'"job:([0-9a-f]{28})/')


class ActiveJobs:
    """The jobs that wait or run. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def uploads_read(self) -> set[tuple[str, str]]:
        """Return the tenant and the sha256 of each upload that they name."""
        return {
            (tenant or DEFAULT_TENANT, sha256)
            for tenant, request in self._fields("tenant", "request")
            for sha256 in UPLOAD_NAMED.findall(request or "")
        }

    def jobs_read(self) -> set[str]:
        """Return the ids of the jobs whose models they name."""
        return {job_id for [request] in self._fields("request") for job_id in JOB_NAMED.findall(request or "")}

    def _fields(self, *names: str) -> Iterator[list[str | None]]:
        """Yield these fields of each of their records."""
        tenants = cast(list[str], self._redis.zrange(self._keys.tenants, 0, -1))
        waiting = [self._keys.waiting(tenant, lane) for tenant in tenants for lane in LANES]
        lists = [*waiting, *map(self._keys.running, tenants)]
        with self._redis.pipeline() as reads:  # at once, since a task may go from one list to another meanwhile
            for key in (*lists, self._keys.due, self._keys.leases):
                reads.zrange(key, 0, -1)
            jobs = list({TaskId.parse(str(name)).job for found in reads.execute() for name in found})
        for first in range(0, len(jobs), READ_AT_ONCE):
            with self._redis.pipeline(transaction=False) as reads:
                for job in jobs[first : first + READ_AT_ONCE]:
                    reads.hmget(self._keys.record(job), list(names))
                yield from cast(list[list[str | None]], reads.execute())
