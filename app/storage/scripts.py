"""The Lua scripts that change what Redis holds of jobs.

Each write is one script, so that it is whole or not at all, and a compare-and-set: against the job's status (the
transitions of `Status`) and, from a worker, against its attempt number. When an answer gets lost the client asks again
by itself, so creating a job, claiming it, recording its progress and ending it are the same the second time.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.commands.core import Script
from redis.exceptions import RedisError

from app.contracts.api_keys import DEFAULT_TENANT
from app.contracts.devices import LANES
from app.contracts.jobs import JobKind, Stage, Status
from app.contracts.limits import HIGHEST_PRIORITY
from app.storage.keys import Keys

READING = ("counts", "startable")
"""Scripts that change nothing."""
REPLICATED_S = 1.0  # less than callers of the API wait for an answer of Redis
Clock = Callable[[], int]
"""Returns milliseconds since the epoch."""

FOLDER = Path(__file__).parent / "lua"
PROGRESS_KEPT = 1000  # a job's newest progress events: eight minutes at two a second, 150 kB
PROGRESS_KEPT_S = 3600  # an hour after the job's end; its other events stay as long as its record
TURN_EVERY = 4  # every fourth start goes by turns alone, so that priorities delay other tenants and never stop them
SHARDS_SEEN = 64  # waiting shards among which a worker looks for one of the checkpoint that it holds
DELIVERIES_KEPT = 100  # a job's newest deliveries to its webhook, 300 kB; those that wait are dropped last
SUMMARY_FIELDS = (
    "tenant", "key", "kind", "name", "method", "status", "priority", "attempt", "created_ms", "started_ms",
    "finished_ms",
    "progress", "error", "labels", "summary", "result",
)  # fmt: skip


class NotReplicated(RedisError):
    """A change is in Redis, and too few replicas have it: if that server were lost now, the change might be too."""


class JobScripts:
    """Runs the scripts in `app/storage/lua`, each of which begins with `prelude.lua` and `queue.lua`.

    Args:
        redis: a client with decode_responses.
        clock: the clock of Redis by default, so that the machines of a deployment need not agree on the time.
        replicas: number of replicas that must have a change before it counts.
    """

    def __init__(self, redis: Redis, keys: Keys, clock: Clock | None = None, replicas: int = 0) -> None:
        self._redis = redis
        self._replicas = replicas
        self._keys = keys
        self._beginning = _constants(keys) + source("prelude") + source("queue")
        self._scripts: dict[str, Script] = {}
        self.clock = clock or redis_clock(redis)

    def run(self, name: str, job_id: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script on a job, with the keys and the time that all scripts begin with.

        Args:
            job_id: '' for a script that finds its job itself, which it does with `work_on` of `queue.lua`.

        Raises redis exceptions; of these, NotReplicated after a change that too few replicas have.
        """
        if name not in self._scripts:
            self._scripts[name] = self._redis.register_script(self._beginning + source(name))
        names = self._keys
        shared = [names.record(job_id), names.result(job_id), names.events(job_id), names.progress(job_id)]
        every = [*shared, names.deadlines, *keys, names.deliveries(job_id)]
        arguments = [self.clock(), *arguments]
        if self._replicas == 0 or name in READING:
            return self._scripts[name](keys=every, args=arguments)
        with self._redis.pipeline(transaction=False) as calls:
            self._scripts[name](keys=every, args=arguments, client=calls)
            return self._replicated(calls)[0]

    def check_replicas(self) -> None:
        """Raise NotReplicated if what was written up to now has not reached as many replicas as it must."""
        if self._replicas:
            with self._redis.pipeline(transaction=False) as calls:
                self._replicated(calls)

    def _replicated(self, calls: Pipeline) -> list[Any]:
        """Make calls, on one connection, and return their outcomes once enough replicas have what they wrote."""
        # Redis waits for what this connection wrote. A script that is repeated writes nothing, and what it wrote the
        # first time must have arrived all the same.
        calls.set(self._keys.replicated, 1)
        calls.wait(self._replicas, int(REPLICATED_S * 1000))
        *outcomes, _, reached = calls.execute()
        if reached < self._replicas:
            raise NotReplicated(f"{reached} of at least {self._replicas} replicas have what was written")
        return outcomes


def redis_clock(redis: Redis) -> Clock:
    """Return the clock of Redis, so that the machines of a deployment need not agree on the time."""

    def now() -> int:
        seconds, micros = redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    return now


def _constants(keys: Keys) -> str:
    """Return what the scripts know from here: states that are final, numbers, and names that no job is part of."""
    values = {
        "PROGRESS_KEPT": PROGRESS_KEPT,
        "PROGRESS_KEPT_S": PROGRESS_KEPT_S,
        "HIGHEST_PRIORITY": HIGHEST_PRIORITY,
        "TURN_EVERY": TURN_EVERY,
        "DEFAULT_TENANT": f"'{DEFAULT_TENANT}'",
        "DEFAULT_KIND": f"'{JobKind.MERGE}'",
        "SUMS": f"'{keys.sums}'",
        "TASK": f"'{keys.task('')}'",
        "LANES": _table(repr(lane) for lane in LANES),
        "WAITING": _by_lane(lambda lane: keys.waiting("", lane)),
        "RUNNING": f"'{keys.running('')}'",
        "TENANTS": f"'{keys.tenants}'",
        "TURNS": _by_lane(keys.turns),
        "RANKS": _by_lane(keys.ranks),
        "LEASES": f"'{keys.leases}'",
        "RECEIVERS": f"'{keys.receivers}'",
        "DELIVERIES_KEPT": DELIVERIES_KEPT,
        "SUMMARY_FIELDS": _table(map(repr, SUMMARY_FIELDS)),
        "RESERVED": f"'{keys.reserved}'",
        "STORED": f"'{keys.stored}'",
        "SHARDS": f"'{keys.shards}'",
        "SHARDS_SEEN": SHARDS_SEEN,
        "MAIN": f"'-{Stage.MERGE}-0'",
        "SHARD": f"'-{Stage.SCORE}-'",
    }
    finals = ", ".join(f"{status} = true" for status in Status if status.is_final)
    return f"local FINAL = {{{finals}}}\n" + "".join(f"local {name} = {value}\n" for name, value in values.items())


def _table(entries: Iterable[str]) -> str:
    """Write a table of Lua."""
    return f"{{{', '.join(entries)}}}"


def _by_lane(key: Callable[[str], str]) -> str:
    """Write a table of Lua with a key for each lane."""
    return _table(f"{lane} = {key(lane)!r}" for lane in LANES)


@cache
def source(name: str) -> str:
    """Return the text of a script."""
    return (FOLDER / f"{name}.lua").read_text(encoding="utf-8")


def listed(statuses: Iterable[Status]) -> str:
    """Join statuses into the text that scripts search: ,a,b,"""
    return "," + ",".join(sorted(statuses)) + ","


def flat(fields: dict[str, Any]) -> list[Any]:
    """Return a hash's fields as Redis takes them: each name followed by its value."""
    return [part for pair in fields.items() for part in pair]
