"""RQ as transport: it carries task ids to workers, at least once. `Tasks` knows the state of each task."""

import secrets

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from app.contracts.jobs import TaskId
from app.storage.jobs import JobStore

GRACE_MS = 5_000  # a task popped from RQ so long ago and still not claimed was popped by a worker that died


class TaskQueue:
    """Hands tasks to RQ, and again when RQ lost them.

    Args:
        redis: a client without decode_responses, as RQ needs it.
    """

    def __init__(self, redis: Redis, name: str, store: JobStore) -> None:
        self.name = name
        self._queue = Queue(name, connection=redis, serializer=JSONSerializer)
        self._store = store

    def dispatch(self, task: TaskId) -> None:
        """Hand `task` to RQ. The message has an id of its own, so that no two dispatches share RQ's bookkeeping."""
        message = f"{task}-{secrets.token_hex(4)}"
        self._store.tasks.dispatched(task, message)
        self._queue.enqueue_call(
            str(task.stage),  # a name in the worker's table of functions, never imported
            args=(str(task),),
            job_id=message,
            timeout=-1,  # leases watch over the work, see `app.storage.tasks`
            result_ttl=0,
            failure_ttl=3600,
            description=str(task),
        )

    def dispatch_lost(self) -> int:
        """Dispatch every waiting task that RQ does not have, and return how many there were."""
        now = self._store.clock()
        lost = 0
        for task in self._store.tasks.due(now - GRACE_MS):
            message = self._store.tasks.message(task)
            if message is None or self._queue.get_job_position(message) is None:
                self.dispatch(task)
                lost += 1
        return lost
