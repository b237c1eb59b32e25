"""Follows jobs as they change. A waiting reader holds no thread and, where there are many, no connection of its own."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from app.contracts.events import Event, EventKind, LogEntry, StatusChange
from app.contracts.jobs import Progress, Status
from app.storage.keys import Keys

TURN_MS = 5_000  # one wait for news, after which a deleted job is noticed and, among many readers, the next has a turn
PRESENT_S = 1.0  # one wait for an entry, after which it is noticed that who waits is gone

Entries = list[tuple[str, dict[str, str]]]


class JobLog:
    """Reads the events of status and log that jobs have had. It raises redis exceptions when Redis is away.

    Args:
        redis: a client with decode_responses.
    """

    def __init__(self, redis: BlockingRedis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    def read(self, job_id: str) -> list[Event]:
        """Return a job's events up to now, oldest first."""
        entries = cast(Entries, self._redis.xrange(self._keys.events(job_id)))
        return [_event(*entry) for entry in entries]


class JobWatcher:
    """Waits for changes of jobs. Raises redis exceptions when Redis is away for longer than the client's patience.

    Args:
        redis: a client with decode_responses whose pool has others wait when all its connections are in use, and whose
            socket timeout is longer than a turn.
    """

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._keys = Keys(prefix)
        self._stopping = asyncio.Event()

    async def follow(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """Yield events later than `after` as they come, until the job has ended and all are read, or it is deleted."""
        while not await self._is_over(job_id, after):
            for event in await self._news(job_id, after):
                yield event
                after = event.id

    async def end(self, job_id: str, after: int, timeout_s: float) -> None:
        """Return when the job has ended or is gone, or the time is over. The caller knows revision `after`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for _ in self.follow(job_id, after):
                    pass

    async def change(self, job_id: str, after: int, timeout_s: float) -> None:
        """Return when the record is later than revision `after` or gone, or the time is over."""
        record = self._keys.record(job_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await self._answer(self._redis.exists(record)):
                    if await self._news(job_id, after):
                        return

    async def pop(self, key: str, timeout_s: float, is_gone: Callable[[], Awaitable[bool]]) -> str | None:
        """Take the first entry of a list as soon as there is one.

        None when the time is over, the service stops, or who waits is gone.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.is_stopping and not await is_gone():
                    found: list[str] | None = await self._answer(self._redis.blpop([key], timeout=PRESENT_S))
                    if found:
                        return found[1]
        return None

    @property
    def is_stopping(self) -> bool:
        """Whether no wait lasts any more."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End every wait, present and future, because the service stops."""
        self._stopping.set()

    async def close(self) -> None:
        await self._redis.aclose()

    async def _is_over(self, job_id: str, after: int) -> bool:
        record = self._keys.record(job_id)
        status, revision = await self._answer(self._redis.hmget(record, ["status", "revision"])) or (None, 0)
        return status is None or (Status(status).is_final and int(revision) <= after)

    async def _news(self, job_id: str, after: int) -> list[Event]:
        """Return events later than `after`, in order, as soon as there are any; none when a turn is over."""
        events, progress = self._keys.events(job_id), self._keys.progress(job_id)
        # Both streams in one command, so that nothing falls between them.
        found: list[tuple[str, Entries]] | None = await self._answer(
            self._redis.xread({events: str(after), progress: str(after)}, block=TURN_MS)
        )
        return sorted((_event(*entry) for _, entries in found or () for entry in entries), key=lambda event: event.id)

    async def _answer(self, command: Awaitable[Any]) -> Any:
        """Return Redis's answer; None when the service stops before it comes."""
        reading = asyncio.ensure_future(command)
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # the reader may be gone by then
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return None if stopping.done() else reading.result()
        finally:
            reading.cancel()
            stopping.cancel()


def _event(entry_id: str, fields: dict[str, str]) -> Event:
    kind = EventKind(fields["event"])
    data: StatusChange | Progress | LogEntry
    match kind:
        case EventKind.STATUS:
            error = json.loads(fields["error"]) if fields["error"] else None
            data = StatusChange.model_validate({**fields, "error": error})
        case EventKind.PROGRESS:
            data = Progress.model_validate_json(fields["progress"])
        case EventKind.LOG:
            data = LogEntry.model_validate(fields)
    return Event(id=int(entry_id.partition("-")[0]), event=kind, data=data)
