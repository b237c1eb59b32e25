"""RQ as transport: it wakes workers, which then claim whatever is next. `Tasks` knows which tasks wait.

Requests to predict have a queue of their own, and a worker goes from one queue to the other. So such a request waits
for the task in hand alone, and a task waits for one such request.
"""

import secrets
from math import ceil

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer

from app.storage.jobs import JobStore

WORK = "work"
"""Name of the function that a message asks for, in the worker's table."""
PREDICT = "predict"
"""Name of the function that a message of the queue of predictions asks for, with the id of an order."""


def queue_of_predictions(name: str) -> str:
    """Return the name of the queue of predictions beside a queue of tasks."""
    return f"{name}-predictions"


class TaskQueue:
    """Wakes workers through RQ. A message says that there is work, and names none.

    Args:
        redis: a client without decode_responses, as RQ needs it.
    """

    def __init__(self, redis: Redis, name: str, store: JobStore) -> None:
        self.name = name
        self._queue = Queue(name, connection=redis, serializer=JSONSerializer)
        self._predictions = Queue(queue_of_predictions(name), connection=redis, serializer=JSONSerializer)
        self._store = store

    def wake(self) -> int:
        """See to it that RQ has a message for each task that may start, and returns how many it added.

        There are never more messages than workers, since a worker that ends a task calls this again. So it is called
        whenever a task may have become one that can start; what a crash leaves undone, and what RQ loses, the next
        sweep makes good.
        """
        wanted = self._store.tasks.startable(max(1, self._store.workers.count()))
        missing = max(0, wanted - self._queue.count) if wanted else 0
        for _ in range(missing):
            self._queue.enqueue_call(
                WORK,  # never imported
                job_id=secrets.token_hex(8),
                timeout=-1,  # leases watch over the work, see `app.storage.tasks`
                result_ttl=0,
                failure_ttl=3600,
                description="there is work",
            )
        return missing

    def ask_to_predict(self, order: str, seconds: float) -> None:
        """Have a worker answer an order, by its id, within so many seconds."""
        self._predictions.enqueue_call(
            PREDICT,  # never imported
            args=(order,),
            job_id=order,
            timeout=-1,  # the order has a deadline
            ttl=ceil(seconds),
            result_ttl=0,
            failure_ttl=3600,
            description="rows wait for answers",
        )

    def predictions_waiting(self) -> int:
        """Return how many orders wait for a worker."""
        return self._predictions.count

    def forget_prediction(self, order: str) -> None:
        """Take an order out of the queue, if it is still there."""
        self._predictions.remove(order)
