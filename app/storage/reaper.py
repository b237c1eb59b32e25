"""Puts back in the queue what lost its worker. Every process runs one; they do not get in each other's way."""

import logging
import threading
from collections.abc import Callable

from redis.exceptions import RedisError

from app.storage.jobs import JobStore
from app.storage.queue import TaskQueue

SWEEP_S = 2.0  # with a lease of 10 s, a lost attempt is back in the queue within 12 s

logger = logging.getLogger(__name__)


class Reaper:
    def __init__(self, store: JobStore, queue: TaskQueue) -> None:
        self._store = store
        self._queue = queue

    def sweep(self) -> None:
        """Release expired attempts and hand waiting tasks that RQ lost to it again."""
        for attempt in self._store.expired():
            if self._store.release(attempt, lost=True, only_expired=True):
                logger.warning("job %s lost its worker in attempt %d", attempt.task.job, attempt.number)
        self._queue.dispatch_lost()


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
