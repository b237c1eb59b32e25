"""Puts jobs that lost their worker back in the queue, and ends jobs that took too long.

Every process runs one; they do not get in each other's way.
"""

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from app.storage.artifacts.store import ArtifactStore
from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue
from app.storage.records import Records
from app.storage.searches import SearchFolder

EXPIRY_S = 5.0
SWEEP_S = 2.0  # with a lease of 10 s, a lost attempt is back in the queue within 12 s

logger = logging.getLogger(__name__)


class Reaper:
    """Puts lost attempts back in the queue, wakes workers whose message was lost, and ends jobs past their deadline.

    Args:
        clock: monotonic clock, in seconds.
    """

    def __init__(self, store: JobStore, queue: TaskQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._queue = queue
        self._clock = clock
        self._answered: float | None = None
        self._spare_until = 0.0

    def sweep(self) -> None:
        """End jobs past their deadline, release expired attempts, and wake workers for tasks that wait.

        While Redis does not answer, nobody can renew a lease. After such a time all attempts have the length of a lease
        to do so.
        """
        self._store.records.time_out()
        now = self._clock()
        if self._answered is not None and now - self._answered > SWEEP_S + self._store.tasks.lease_seconds / 2:
            self._spare_until = now + self._store.tasks.lease_seconds
        self._answered = now
        if now >= self._spare_until:
            self._release_expired()
        self._store.tasks.adopt()
        self._queue.wake()

    def _release_expired(self) -> None:
        for attempt in self._store.tasks.expired():
            if self._store.tasks.release(attempt, lost=True, only_expired=True):
                logger.warning("job %s lost its worker in attempt %d", attempt.task.job, attempt.number)


def remove_outlived(records: Records, artifacts: ArtifactStore, searches: SearchFolder) -> None:
    """Forget the jobs that have been kept for their time, and remove what they made.

    The record goes first, so that no reader finds one without its artifact. If a crash leaves the artifact, it is
    swept, because no record names it.
    """
    for job in records.outlived():
        if records.expire(job):
            logger.info("job %s has been kept for its time and is removed", job.id)
            if job.artifact is not None:
                artifacts.remove(job.artifact)
            searches.remove(job.id)


class Repeater(threading.Thread):
    """Calls a function every so often until it is stopped; Redis being away is no reason to end."""

    def __init__(self, interval_s: float, call: Callable[[], object]) -> None:
        super().__init__(daemon=True, name="repeater")
        self._interval = interval_s
        self._call = call
        self._stop_event = threading.Event()

    def run(self) -> None:
        while True:
            try:
                self._call()
            except RedisError as error:
                logger.warning("Redis is away: %s", error)
            except Exception:  # the next round may go better, and without rounds lost jobs would stay lost
                logger.exception("a periodic task failed")
            if self._stop_event.wait(self._interval):
                return

    def stop(self) -> None:
        self._stop_event.set()
        self.join(timeout=5)
